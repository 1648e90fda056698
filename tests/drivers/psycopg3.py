"""psycopg 3 on one connection across a cutover. See README.md in this directory."""

import os
import pathlib
import sys
import time

import psycopg

DRIVER = "psycopg3"
DIRECTORY = pathlib.Path(os.environ["DRIVER_DIR"])
INSERT = "INSERT INTO driver_writes (driver, n, mood, note) VALUES (%s, %s, %s, %s)"


def one(connection, sql, *parameters):
    return connection.execute(sql, parameters).fetchone()[0]


def main():
    # Statements are prepared on the server at their first use.
    connection = psycopg.connect("", autocommit=True, prepare_threshold=0, application_name="driver-psycopg3")
    port = one(connection, "SELECT inet_server_port()")
    pid = one(connection, "SELECT pg_backend_pid()")
    connection.execute("SET search_path TO shop, \"$user\", public")
    connection.execute("SET TimeZone TO 'Asia/Kolkata'")
    connection.execute("SELECT set_config('app.driver', %s, false)", ["it's " + DRIVER])
    connection.execute("LISTEN driver_psycopg3")

    acknowledged = 0

    def work(count):
        nonlocal acknowledged
        for _ in range(count):
            n = acknowledged
            step = n % 5
            if step == 0:
                with connection.transaction():
                    connection.execute(INSERT, [DRIVER, n + 1, "glad", "transaction"])
                    connection.execute(INSERT, [DRIVER, n + 2, "sad", "transaction"])
                acknowledged += 2
            elif step == 2:
                with connection.pipeline():
                    connection.execute(INSERT, [DRIVER, n + 1, "glad", "pipeline"])
                    connection.execute("SELECT count(*) FROM driver_writes WHERE driver = %s", [DRIVER])
                acknowledged += 1
            elif step == 3:
                with connection.cursor() as cursor:
                    with cursor.copy("COPY driver_writes (driver, n, mood, note) FROM STDIN") as copy:
                        copy.write_row([DRIVER, n + 1, "sad", "copy"])
                acknowledged += 1
            else:
                with connection.transaction(force_rollback=True):
                    connection.execute(INSERT, [DRIVER, n + 1, "glad", "undone"])
                connection.execute(INSERT, [DRIVER, n + 1, "glad", "autocommit"])
                acknowledged += 1
            # A cursor on the server, read in parts.
            with connection.transaction(), connection.cursor(name="parts") as cursor:
                cursor.execute("SELECT n FROM driver_writes WHERE driver = %s ORDER BY n DESC LIMIT 30", [DRIVER])
                newest = cursor.fetchmany(10)[0][0]
                assert newest == acknowledged, f"newest {newest}, acknowledged {acknowledged}"
            time.sleep(0.002)

    work(20)
    (DIRECTORY / "ready").touch()
    while not (DIRECTORY / "switched").exists():
        work(5)
    work(40)

    expected_port = int((DIRECTORY / "switched").read_text())
    now_port = one(connection, "SELECT inet_server_port()")
    assert now_port == expected_port, f"on port {now_port}, expected {expected_port}"
    assert now_port == port or one(connection, "SELECT pg_backend_pid()") != pid, "still on the old backend"
    assert one(connection, "SELECT current_setting('app.driver')") == "it's " + DRIVER
    assert one(connection, "SHOW search_path") == 'shop, "$user", public'
    assert connection.info.parameter_status("TimeZone") == one(connection, "SHOW TimeZone") == "Asia/Kolkata"
    assert one(connection, "SHOW application_name") == "driver-psycopg3"
    assert one(connection, "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'INSERT INTO driver%%'") >= 1
    connection.execute("NOTIFY driver_psycopg3, 'still there'")
    for notify in connection.notifies(timeout=10, stop_after=1):
        assert notify.payload == "still there"
        break
    else:
        raise AssertionError("no notification arrived")
    rows = connection.execute("SELECT n FROM driver_writes WHERE driver = %s ORDER BY n", [DRIVER]).fetchall()
    assert [row[0] for row in rows] == list(range(1, acknowledged + 1)), "missing or foreign numbers"
    connection.close()
    print(f"ACKNOWLEDGED {acknowledged}")
    print("PASS")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"FAIL {type(error).__name__}: {error}")
        sys.exit(1)

"""asyncpg on one connection across a cutover. See README.md in this directory."""

import asyncio
import os
import pathlib
import sys

import asyncpg

DRIVER = "asyncpg"
DIRECTORY = pathlib.Path(os.environ["DRIVER_DIR"])
INSERT = "INSERT INTO driver_writes (driver, n, mood, note) VALUES ($1, $2, $3, $4)"


async def main():
    connection = await asyncpg.connect(server_settings={"application_name": "driver-asyncpg"})
    lost = []
    connection.add_termination_listener(lambda _: lost.append("connection lost"))
    port = await connection.fetchval("SELECT inet_server_port()")
    pid = await connection.fetchval("SELECT pg_backend_pid()")
    await connection.execute('SET search_path TO shop, "$user", public')
    await connection.execute("SET TimeZone TO 'Asia/Kolkata'")
    await connection.fetchval("SELECT set_config('app.driver', $1, false)", "it's " + DRIVER)
    heard = asyncio.Queue()
    await connection.add_listener("driver_asyncpg", lambda *event: heard.put_nowait(event[3]))
    # Both a statement that the application keeps and those of the driver's own cache.
    kept = await connection.prepare("SELECT max(n), $2::mood FROM driver_writes WHERE driver = $1")

    acknowledged = 0

    async def work(count):
        nonlocal acknowledged
        for _ in range(count):
            n = acknowledged
            step = n % 5
            if step == 0:
                async with connection.transaction(isolation="repeatable_read"):
                    await connection.execute(INSERT, DRIVER, n + 1, "glad", "transaction")
                    await connection.execute(INSERT, DRIVER, n + 2, "sad", "transaction")
                acknowledged += 2
            elif step == 2:
                await connection.executemany(INSERT, [(DRIVER, n + 1, "glad", "many"), (DRIVER, n + 2, "sad", "many")])
                acknowledged += 2
            elif step == 4:
                columns = ["driver", "n", "mood", "note"]
                await connection.copy_records_to_table(
                    "driver_writes", records=[(DRIVER, n + 1, "sad", "copy")], columns=columns, schema_name="shop"
                )
                acknowledged += 1
            else:
                try:
                    async with connection.transaction():
                        await connection.execute(INSERT, DRIVER, n + 1, "glad", "undone")
                        await connection.execute("SELECT 1 / 0")
                except asyncpg.DivisionByZeroError:
                    pass
                await connection.execute(INSERT, DRIVER, n + 1, "glad", "autocommit")
                acknowledged += 1
            newest, mood = await kept.fetchrow(DRIVER, "sad")
            assert (newest, mood) == (acknowledged, "sad"), f"newest {newest}, acknowledged {acknowledged}"
            async with connection.transaction():
                async for _ in connection.cursor("SELECT n FROM driver_writes WHERE driver = $1 LIMIT 30", DRIVER, prefetch=10):
                    pass
            await asyncio.sleep(0.002)

    await work(20)
    (DIRECTORY / "ready").touch()
    while not (DIRECTORY / "switched").exists():
        await work(5)
    await work(40)

    expected_port = int((DIRECTORY / "switched").read_text())
    now_port = await connection.fetchval("SELECT inet_server_port()")
    assert now_port == expected_port, f"on port {now_port}, expected {expected_port}"
    assert now_port == port or await connection.fetchval("SELECT pg_backend_pid()") != pid, "still on the old backend"
    assert await connection.fetchval("SELECT current_setting('app.driver')") == "it's " + DRIVER
    assert await connection.fetchval("SHOW search_path") == 'shop, "$user", public'
    assert await connection.fetchval("SHOW TimeZone") == connection.get_settings().TimeZone == "Asia/Kolkata"
    assert await connection.fetchval("SHOW application_name") == "driver-asyncpg"
    await connection.execute("NOTIFY driver_asyncpg, 'still there'")
    assert await asyncio.wait_for(heard.get(), 10) == "still there"
    rows = await connection.fetch("SELECT n FROM driver_writes WHERE driver = $1 ORDER BY n", DRIVER)
    assert [row["n"] for row in rows] == list(range(1, acknowledged + 1)), "missing or foreign numbers"
    assert not lost, lost
    await connection.close()
    print(f"ACKNOWLEDGED {acknowledged}")
    print("PASS")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except Exception as error:
        print(f"FAIL {type(error).__name__}: {error}")
        sys.exit(1)

//! COPY at the level of its bytes, between two connections to a real server.

use pgcutover::postgres::RawConnection;

use super::raw;
use super::support::one_cluster;

const MANY_ROWS: &str = "SELECT g, repeat(md5(g::text), 5), CASE WHEN g % 3 = 0 THEN NULL ELSE E'a\\tb\\\\c' END
                         FROM generate_series(1, 50000) g";

#[tokio::test]
async fn copy_passes_bytes_from_one_connection_to_another() {
    let cluster = one_cluster("copy");
    let (mut reader, mut writer) = (raw(&cluster).await, raw(&cluster).await);
    reader
        .simple_query(&format!("CREATE TABLE public.a AS {MANY_ROWS}; CREATE TABLE public.b (LIKE public.a)"))
        .await
        .expect("made");
    for format in ["text", "binary"] {
        let mut output = reader.copy_out(&format!("COPY public.a TO STDOUT (FORMAT {format})")).await.expect("starts");
        let mut input = writer.copy_in(&format!("COPY public.b FROM STDIN (FORMAT {format})")).await.expect("starts");
        while let Some(data) = output.next().await.expect("reads") {
            input.send(&data).await.expect("writes");
        }
        assert_eq!(output.rows(), Some(50_000));
        assert_eq!(input.finish().await.expect("finishes"), 50_000);
        let sql = "SELECT count(*) FROM ((TABLE public.a UNION ALL TABLE public.a) EXCEPT ALL TABLE public.b) d";
        assert_eq!(reader.simple_query(sql).await.expect("compares")[0][0].as_deref(), Some("50000"));
        // The same without looking at rows.
        writer.simple_query("TRUNCATE public.b").await.expect("emptied");
        let (messages, bytes) = handed_on(&mut reader, &mut writer, format).await;
        assert_eq!(messages, 50_000 + if format == "binary" { 1 } else { 0 });
        assert!(bytes > 50_000 * 100, "{bytes}");
        writer.simple_query("INSERT INTO public.b TABLE public.b").await.expect("doubled");
        let sql = "SELECT count(*) FROM ((TABLE public.a UNION ALL TABLE public.a) EXCEPT ALL TABLE public.b) d";
        assert_eq!(reader.simple_query(sql).await.expect("compares")[0][0].as_deref(), Some("0"));
        writer.simple_query("TRUNCATE public.b").await.expect("emptied");
    }
}

/// Copies `public.a` into `public.b`; messages and bytes.
async fn handed_on(reader: &mut RawConnection, writer: &mut RawConnection, format: &str) -> (u64, u64) {
    let mut output = reader.copy_out(&format!("COPY public.a TO STDOUT (FORMAT {format})")).await.expect("starts");
    let mut input = writer.copy_in(&format!("COPY public.b FROM STDIN (FORMAT {format})")).await.expect("starts");
    let (mut messages, mut bytes) = (0, 0);
    while let Some(moved) = output.hand_on(&mut input, 10_000).await.expect("moves") {
        messages += moved.messages;
        bytes += moved.bytes;
    }
    let sent = output.rows();
    assert_eq!(Some(input.finish().await.expect("finishes")), sent);
    (messages, bytes)
}

#[tokio::test]
async fn long_values_and_notices_pass_through_a_copy() {
    let cluster = one_cluster("copy-long");
    let (mut reader, mut writer) = (raw(&cluster).await, raw(&cluster).await);
    reader
        .simple_query(
            "CREATE FUNCTION public.loud(n int) RETURNS bytea LANGUAGE plpgsql AS
                 $$ BEGIN RAISE NOTICE 'row %', n; RETURN convert_to(repeat(md5(n::text), n * 300000), 'UTF8'); END $$;
             CREATE VIEW public.loud AS SELECT g AS n, public.loud(g) AS v FROM generate_series(0, 3) g;
             CREATE TABLE public.a (n int, v bytea); CREATE TABLE public.b (n int, v bytea);
             INSERT INTO public.a TABLE public.loud",
        )
        .await
        .expect("made");
    for format in ["text", "binary"] {
        let sql = format!("COPY (SELECT * FROM public.loud) TO STDOUT (FORMAT {format})");
        let mut output = reader.copy_out(&sql).await.expect("starts");
        let mut input = writer.copy_in(&format!("COPY public.b FROM STDIN (FORMAT {format})")).await.expect("starts");
        while output.hand_on(&mut input, 1).await.expect("moves").is_some() {}
        assert_eq!(input.finish().await.expect("finishes"), 4);
        let sql = "SELECT count(*) FROM (TABLE public.a EXCEPT ALL TABLE public.b) d";
        assert_eq!(reader.simple_query(sql).await.expect("compares")[0][0].as_deref(), Some("0"), "{format}");
        writer.simple_query("TRUNCATE public.b").await.expect("emptied");
        handed_on(&mut reader, &mut writer, format).await;
        writer.simple_query("TRUNCATE public.b").await.expect("emptied");
    }
    let mut output =
        reader.copy_out("COPY (SELECT 1 / (3 - g) FROM generate_series(1, 9) g) TO STDOUT").await.expect("starts");
    let mut input = writer.copy_in("COPY public.b (n) FROM STDIN").await.expect("starts");
    let error = loop {
        match output.hand_on(&mut input, 1).await {
            Ok(moved) => assert!(moved.is_some(), "it must fail"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.sqlstate(), Some("22012"), "{error}");
    input.fail("nothing more").await.expect("given up");
    reader.simple_query("SELECT 1").await.expect("usable after the error");
}

#[tokio::test]
async fn copy_errors_name_their_side_and_leave_the_connection_usable() {
    let cluster = one_cluster("copy-errors");
    let mut raw = raw(&cluster).await;
    raw.simple_query("CREATE TABLE public.t (n int PRIMARY KEY)").await.expect("made");

    let error = raw.copy_out("COPY public.missing TO STDOUT").await.expect_err("no such table");
    assert!(error.to_string().starts_with("COPY out of the source: "), "{error}");
    let mut output =
        raw.copy_out("COPY (SELECT 1 / (3 - g) FROM generate_series(1, 9) g) TO STDOUT").await.expect("starts");
    let error = loop {
        match output.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the third row divides by zero"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.sqlstate(), Some("22012"));

    // The error is noticed while data still flows, long before the end of it.
    let mut input = raw.copy_in("COPY public.t FROM STDIN").await.expect("starts");
    let mut pieces = 0;
    let error = loop {
        pieces += 1;
        assert!(pieces < 1_000_000, "the server's error was never noticed");
        if let Err(error) = input.send(b"1\n1\nx\n").await {
            break error;
        }
    };
    assert!(error.to_string().starts_with("COPY into the source: "), "{error}");
    let input = raw.copy_in("COPY public.t FROM STDIN").await.expect("usable after the error");
    assert_eq!(input.finish().await.expect("nothing to copy"), 0);

    let mut input = raw.copy_in("COPY public.t FROM STDIN").await.expect("starts");
    input.send(b"7\n").await.expect("gathered");
    input.fail("the source failed").await.expect("rolled back");
    assert_eq!(raw.simple_query("SELECT n FROM public.t").await.expect("usable"), Vec::<Vec<_>>::new());

    raw.copy_out("COPY (SELECT generate_series(1, 100000)) TO STDOUT").await.expect("starts and is dropped");
    assert!(raw.simple_query("SELECT 1").await.is_err(), "a COPY was abandoned");
}

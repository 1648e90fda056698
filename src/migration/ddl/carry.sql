-- What the source has while its definitions are carried over. Made by carry.rs in one transaction; nothing here is ever
-- executed on the target. Every function that names something unqualified has its search_path pinned.

-- The commands, in the publication: a row arrives in the stream where its command stood. Nobody but the function below
-- may write here.
CREATE TABLE pgcutover.command (
    id           bigserial PRIMARY KEY,
    recorded_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid          bigint NOT NULL,
    statement_at timestamptz NOT NULL,
    tag          text NOT NULL,
    command      text NOT NULL,
    role         text NOT NULL,
    settings     json NOT NULL
);
REVOKE ALL ON pgcutover.command FROM PUBLIC;

-- Whether commands may pass. Whoever shuts it waits for the transactions that have passed.
CREATE TABLE pgcutover.ddl_gate (
    id             integer PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    shut_because   text,
    migration      text NOT NULL,
    publication    text NOT NULL,
    full_identity  boolean NOT NULL,
    target_version integer NOT NULL
);
REVOKE ALL ON pgcutover.ddl_gate FROM PUBLIC;

-- Tables that were given REPLICA IDENTITY FULL because they came without any.
CREATE TABLE IF NOT EXISTS pgcutover.full_identity (oid oid PRIMARY KEY);
REVOKE ALL ON pgcutover.full_identity FROM PUBLIC;

-- A query without comments, and with nothing inside its quotes unless these are `kept`; null: it cannot be read. Semicolons at
-- the end are left out.
CREATE FUNCTION pgcutover.bare(query text, backslashes boolean, kept boolean) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog SET standard_conforming_strings = on AS $body$
DECLARE
    rest text := query;
    bare text := '';
    token text;
    body integer;
BEGIN
    LOOP
        token := substring(rest FROM '^[^''"$/-]+');
        IF token IS NOT NULL THEN
            bare := bare || token;
            rest := substr(rest, length(token) + 1);
        END IF;
        EXIT WHEN rest = '';
        IF left(rest, 2) = '--' THEN
            token := substring(rest FROM '^--[^\n\r]*');
            bare := bare || ' ';
        ELSIF left(rest, 2) = '/*' THEN
            token := substring(rest FROM '^/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/');
            bare := bare || ' ';
        ELSIF left(rest, 1) = '"' THEN
            token := substring(rest FROM '^"(?:[^"]|"")*"');
            bare := bare || CASE WHEN kept THEN token ELSE '""' END;
        ELSIF left(rest, 1) = '''' AND (backslashes OR bare ~ '(^|[^[:alnum:]_$])[eE]$') THEN
            token := substring(rest FROM '^''(?:[^''\\]|''''|\\.)*''');
            bare := bare || CASE WHEN kept THEN token ELSE '''''' END;
        ELSIF left(rest, 1) = '''' THEN
            token := substring(rest FROM '^''(?:[^'']|'''')*''');
            bare := bare || CASE WHEN kept THEN token ELSE '''''' END;
        ELSE
            token := left(rest, 1);
            IF token = '$' AND bare !~ '[[:alnum:]_$]$' THEN
                token := coalesce(substring(rest FROM '^\$(?:[^[:space:][:digit:]$''"();,.][^[:space:]$''"();,.]*)?\$'), '$');
            END IF;
            IF length(token) = 1 THEN
                bare := bare || token;
            ELSE
                body := strpos(substr(rest, length(token) + 1), token);
                token := CASE WHEN body > 0 THEN left(rest, body - 1 + 2 * length(token)) END;
                bare := bare || CASE WHEN kept THEN token ELSE '''''' END;
            END IF;
        END IF;
        IF token IS NULL THEN
            RETURN NULL;
        END IF;
        rest := substr(rest, length(token) + 1);
    END LOOP;
    RETURN regexp_replace(regexp_replace(bare, '[[:space:];]+$', ''), '^[[:space:];]+', '');
END
$body$;

-- Whether more than one command was sent, of what bare() has left. A function's body and what a rule does may be several.
CREATE FUNCTION pgcutover.is_several(tag text, bare text) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog AS $body$
BEGIN
    IF tag IN ('CREATE FUNCTION', 'CREATE PROCEDURE') THEN
        bare := regexp_replace(bare, '\mbegin\s+atomic\M.*\mend\M', '', 'i');
    ELSIF tag = 'CREATE RULE' THEN
        WHILE bare ~ '\([^()]*\)' LOOP
            bare := regexp_replace(bare, '\([^()]*\)', '', 'g');
        END LOOP;
    END IF;
    RETURN strpos(bare, ';') > 0;
END
$body$;

-- Something in a command that need not come to the same on two servers; null: nothing does. Settings are carried, so what
-- depends on nothing else is the same. The command comes without its comments.
CREATE FUNCTION pgcutover.unsettled(query text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog SET standard_conforming_strings = on AS $body$
    SELECT found.word FROM (
        SELECT m[1] AS word FROM regexp_matches(lower(query), '\m(current_date|current_time|current_timestamp|localtime|localtimestamp|current_user|session_user|current_role|current_catalog|current_schema|user|now|today|tomorrow|yesterday)\M', 'g') m
        UNION ALL
        SELECT name || '()' FROM (
            SELECT coalesce(replace(m[1], '""', '"'), m[2]) FROM
                regexp_matches(lower(query), '(?:"((?:[^"]|"")+)"|([^][:space:]"''()[,;.:*/<>=~!@#%^&|`?+-]+))[[:space:]]*\(', 'g') m
         ) called (name)
         WHERE name NOT IN ('timestamp', 'timestamptz', 'time', 'timetz', 'date', 'interval', 'extract', 'date_part', 'date_trunc', 'timezone', 'concat', 'concat_ws', 'text', 'numeric')
           AND EXISTS (SELECT FROM pg_proc p WHERE lower(p.proname) = name AND p.provolatile <> 'i')
        UNION ALL
        SELECT 'operator ' || o.oprname FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode
         WHERE o.oid >= 16384 AND p.provolatile = 'v'
        UNION ALL
        SELECT 'the cast by ' || p.proname FROM pg_cast c JOIN pg_proc p ON p.oid = c.castfunc
         WHERE c.oid >= 16384 AND p.provolatile = 'v'
    ) found LIMIT 1
$body$;

-- Does what on_ddl() says. Only that function may call it. What it does itself fires nothing.
CREATE FUNCTION pgcutover.record_ddl(event text, tag text, login text, set_role text, settings json) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog SET standard_conforming_strings = on
    SET session_replication_role = replica AS $body$
DECLARE
    passing constant text := 'REFRESH MATERIALIZED VIEW|REINDEX';
    carried constant text :=
        '(CREATE|ALTER|DROP) (TABLE|SEQUENCE|VIEW|FUNCTION|PROCEDURE|ROUTINE|AGGREGATE|TYPE|DOMAIN|TRIGGER|POLICY|RULE|STATISTICS|SCHEMA|INDEX)|ALTER DEFAULT PRIVILEGES|COMMENT|GRANT|REVOKE';
    query constant text := current_query();
    backslashes constant boolean := settings ->> 'standard_conforming_strings' = 'off';
    bare text;
    whole text;
    gate record;
    kept boolean;
    temporary boolean;
    names text;
    table_name regclass;
    refusal text;
BEGIN
    IF current_setting('application_name') LIKE 'pgcutover/%' OR tag ~ ('^(' || passing || ')$') THEN
        RETURN;
    END IF;
    bare := pgcutover.bare(query, backslashes, false);
    IF event <> 'ddl_command_start' THEN
        whole := pgcutover.bare(query, backslashes, true);
    END IF;
    IF event = 'ddl_command_start' THEN
        -- Inside a REFRESH … CONCURRENTLY the server alters temporary tables of its own.
        IF coalesce(bare, query) ~* '\mconcurrently\M' AND coalesce(bare, query) !~* '\mrefresh\s+materialized\s+view\M' THEN
            refusal := 'what is done CONCURRENTLY cannot be done in a transaction of its own kind on the target; leave the word out';
        END IF;
    ELSIF event = 'table_rewrite' THEN
        IF (SELECT relpersistence = 't' FROM pg_class WHERE oid = pg_event_trigger_table_rewrite_oid()) THEN
            NULL;
        ELSIF pg_event_trigger_table_rewrite_reason() & 1 <> 0 THEN
            refusal := 'rows of a table that becomes logged are in no stream';
        ELSIF pg_event_trigger_table_rewrite_reason() & 2 <> 0 AND whole ~* '\m(small|big)?serial[248]?\M|\midentity\M' THEN
            refusal := 'the numbers that the rows are given may differ; add the column without them, and UPDATE the rows';
        ELSIF pg_event_trigger_table_rewrite_reason() & 6 <> 0 AND whole IS NULL THEN
            refusal := 'it cannot be told what the command consists of; comments inside comments are not read';
        ELSIF pg_event_trigger_table_rewrite_reason() & 6 <> 0 THEN
            names := pgcutover.unsettled(whole);
            IF names IS NOT NULL THEN
                refusal := format('the values that it computes may differ on another server because of %s; add the column without them, and UPDATE the rows', names);
            END IF;
        END IF;
    END IF;
    IF event IN ('ddl_command_start', 'table_rewrite') THEN
        IF refusal IS NULL THEN
            RETURN;
        END IF;
        PERFORM pgcutover.refuse(tag, refusal);
    END IF;

    -- No event tells which rights it takes.
    IF event = 'ddl_command_end' AND tag = 'DROP OWNED' THEN
        PERFORM pgcutover.refuse(tag, 'this kind of command is not carried over to the target');
    END IF;

    -- What is dropped is known to one event only, everything else to the other.
    IF (event = 'sql_drop') <> (tag LIKE 'DROP %') THEN
        RETURN;
    ELSIF event = 'sql_drop' THEN
        SELECT bool_or(d.is_temporary), bool_or(NOT d.is_temporary) INTO temporary, kept
          FROM pg_event_trigger_dropped_objects() d WHERE d.original;
    ELSE
        -- Large objects are brought over whole, with their owner, rights and comment.
        SELECT bool_or(c.schema_name IS NOT DISTINCT FROM 'pg_temp'),
               bool_or(c.schema_name IS DISTINCT FROM 'pg_temp' AND lower(c.object_type) <> 'large object')
          INTO temporary, kept FROM pg_event_trigger_ddl_commands() c;
    END IF;
    IF kept IS NOT TRUE THEN
        RETURN;
    END IF;

    SELECT * INTO gate FROM pgcutover.ddl_gate FOR SHARE;
    refusal := CASE
        WHEN gate.shut_because IS NOT NULL THEN gate.shut_because
        WHEN NOT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                          WHERE p.pubname = gate.publication AND r.prrelid = 'pgcutover.command'::regclass)
            THEN 'nobody follows the definitions of this server any more'
        WHEN tag !~ ('^(' || carried || ')$')
            THEN 'this kind of command is not carried over to the target'
        WHEN bare IS NULL
            THEN 'it cannot be told what the command consists of; comments inside comments are not read'
        WHEN pgcutover.is_several(tag, bare)
            THEN 'several commands were sent at once; send this one by itself'
        WHEN regexp_replace(regexp_replace(upper(bare), '[[:space:]]+', ' ', 'g'),
                 '^CREATE (?:(?:OR REPLACE|UNLOGGED|GLOBAL|LOCAL|TEMP|TEMPORARY|UNIQUE|RECURSIVE|CONSTRAINT) )+', 'CREATE ')
             !~ ('^' || tag || '( |$|")')
            THEN 'it was run by another command, or by a function; send it by itself'
        WHEN EXISTS (SELECT FROM pgcutover.command c
                      WHERE c.xid = txid_current() AND c.statement_at = statement_timestamp())
            THEN 'the command runs others; send each of them by itself'
        WHEN temporary
            THEN 'it is about temporary objects and others'
        WHEN EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = pg_my_temp_schema()
                        AND c.relkind IN ('r', 'v', 'S', 'p')
                        AND CASE WHEN c.relname ~ '^\w+$' THEN query ~* ('\m' || c.relname || '\M')
                                 ELSE strpos(lower(query), lower(c.relname)) > 0 END)
            THEN 'it may be about a temporary object, which the target does not have; drop that one, or use another session'
        WHEN tag = 'ALTER SCHEMA' AND bare ~* '\mrename\M'
            THEN 'the stream does not tell that tables have moved to a schema of another name'
        WHEN tag = 'ALTER TYPE' AND gate.target_version < 120000 AND bare ~* '\madd\s+value\M'
            THEN 'a target older than PostgreSQL 12 adds no values in a transaction'
        WHEN tag = 'ALTER TYPE' AND bare ~* '\m(rename\s+value|(add|drop|alter)\s+attribute)\M'
          OR tag = 'ALTER DOMAIN' AND bare ~* '\mnot\s+valid\M'
            THEN 'what transactions that are open have written would not fit the target any more'
        WHEN bare ~* '\m(to|authorization|role|user|by|from|for)\s+session_user\M|,\s*session_user\M'
            THEN 'SESSION_USER is another role on the target; name the role'
        WHEN tag = 'ALTER TABLE' AND bare ~* '\menable\s+(always|replica)\M'
            THEN 'a trigger or rule that fires for what the stream brings would do its work a second time on the target; do it after the cutover'
        WHEN tag IN ('CREATE TABLE', 'ALTER TABLE') AND bare ~* '\mfor\s+values\M' AND pgcutover.unsettled(whole) IS NOT NULL
            THEN format('the bounds may differ on another server because of %s; write them as constants',
                        pgcutover.unsettled(whole))
        WHEN tag = 'ALTER TABLE' AND bare ~* '\madd\M' AND bare ~* '\mdefault\M' AND pgcutover.unsettled(whole) IS NOT NULL
            THEN format('the value that rows are given may differ on another server because of %s; add the column without a default, then set that, and UPDATE the rows',
                        pgcutover.unsettled(whole))
        WHEN tag = 'ALTER TABLE' AND bare ~* '\madd\s+(?!(constraint|primary|unique|check|foreign|exclude)\M)'
             AND event = 'ddl_command_end' AND EXISTS (
                 SELECT FROM pg_event_trigger_ddl_commands() c JOIN pg_attribute a ON a.attrelid = c.objid AND NOT a.attisdropped
                   JOIN pg_type t ON t.oid = a.atttypid AND t.typtype = 'd' AND t.typdefaultbin IS NOT NULL
                  WHERE c.classid = 'pg_class'::regclass AND a.attnum > 0)
            THEN 'the table has a column whose domain has a default, whose value may differ on another server'
    END;
    IF refusal IS NOT NULL THEN
        PERFORM pgcutover.refuse(tag, refusal);
    END IF;

    INSERT INTO pgcutover.command (xid, statement_at, tag, command, role, settings)
    VALUES (txid_current(), statement_timestamp(), tag, query, CASE set_role WHEN 'none' THEN login ELSE set_role END, settings);

    IF event = 'ddl_command_end' THEN
        FOR table_name IN
            SELECT k.oid FROM pg_event_trigger_ddl_commands() c JOIN pg_class k ON k.oid = c.objid
             WHERE c.classid = 'pg_class'::regclass AND c.command_tag = 'CREATE TABLE'
               AND k.relkind = 'r' AND k.relpersistence = 'p'
        LOOP
            EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %s', gate.publication, table_name);
        END LOOP;
    END IF;
    -- An UPDATE of a published table that has lost what identifies its rows, or never had it, would fail.
    FOR table_name IN
        SELECT k.oid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class k ON k.oid = r.prrelid
         WHERE p.pubname = gate.publication AND k.relnamespace <> 'pgcutover'::regnamespace
           AND NOT CASE k.relreplident
                   WHEN 'f' THEN true
                   WHEN 'd' THEN EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid)
                   WHEN 'i' THEN EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.oid AND i.indisreplident AND i.indimmediate AND i.indisvalid)
                   ELSE false END
    LOOP
        IF NOT gate.full_identity THEN
            PERFORM pgcutover.refuse(tag, format('%s would have no replica identity; give it a primary key in the same command', table_name));
        END IF;
        EXECUTE format('ALTER TABLE ONLY %s REPLICA IDENTITY FULL', table_name);
        INSERT INTO pgcutover.full_identity VALUES (table_name) ON CONFLICT DO NOTHING;
    END LOOP;
    -- What is left of a key without its generated column, which is in no stream before PostgreSQL 18, would be taken for the
    -- whole, and rows for each other; the rule generated_identity refuses such tables too. Whole rows are all columns, and no
    -- publication has virtual ones: UPDATE and DELETE of the application would fail.
    IF current_setting('server_version_num')::integer >= 120000 THEN
        FOR refusal IN
            SELECT CASE k.relreplident
                   WHEN 'f' THEN format('%s is identified by whole rows, and its virtual column %I is in no publication; give it a key, and that as its replica identity', k.oid::regclass, a.attname)
                   ELSE format('rows of %s would be identified by the generated column %I; give it a key without that', k.oid::regclass, a.attname) END
              FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class k ON k.oid = r.prrelid
              JOIN pg_attribute a ON a.attrelid = k.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> ''
             WHERE p.pubname = gate.publication AND k.relnamespace <> 'pgcutover'::regnamespace
               AND CASE k.relreplident
                   WHEN 'f' THEN a.attgenerated = 'v'
                   ELSE EXISTS (SELECT FROM pg_index i WHERE i.indrelid = k.oid AND a.attnum = ANY (i.indkey::int2[])
                                   AND (k.relreplident = 'd' AND i.indisprimary OR k.relreplident = 'i' AND i.indisreplident)) END
        LOOP
            PERFORM pgcutover.refuse(tag, refusal);
        END LOOP;
    END IF;
END
$body$;

CREATE FUNCTION pgcutover.refuse(tag text, why text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $body$
BEGIN
    RAISE EXCEPTION '% is refused while the database is being moved: %', tag, why
        USING ERRCODE = 'object_not_in_prerequisite_state',
              DETAIL = format('The database is being moved by the pgcutover migration %s.',
                              (SELECT migration FROM pgcutover.ddl_gate)),
              HINT = 'Do as the message says, wait until the migration is complete, or cancel it.';
END
$body$;

-- Has no search_path of its own, because it reads the caller's: whatever is named in it is qualified, and there is no operator.
CREATE FUNCTION pgcutover.on_ddl() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $body$
BEGIN
    PERFORM pgcutover.record_ddl(
        TG_EVENT,
        TG_TAG,
        session_user::pg_catalog.text,
        pg_catalog.current_setting('role'),
        pg_catalog.json_build_object(
            'search_path', pg_catalog.current_setting('search_path'),
            'standard_conforming_strings', pg_catalog.current_setting('standard_conforming_strings'),
            'DateStyle', pg_catalog.current_setting('DateStyle'),
            'IntervalStyle', pg_catalog.current_setting('IntervalStyle'),
            'TimeZone', pg_catalog.current_setting('TimeZone'),
            'bytea_output', pg_catalog.current_setting('bytea_output'),
            'extra_float_digits', pg_catalog.current_setting('extra_float_digits'),
            'xmloption', pg_catalog.current_setting('xmloption'),
            'array_nulls', pg_catalog.current_setting('array_nulls'),
            'transform_null_equals', pg_catalog.current_setting('transform_null_equals'),
            'default_tablespace', pg_catalog.current_setting('default_tablespace'),
            'default_table_access_method', pg_catalog.current_setting('default_table_access_method', true)));
END
$body$;
REVOKE ALL ON FUNCTION pgcutover.record_ddl(text, text, text, text, json) FROM PUBLIC;

CREATE EVENT TRIGGER pgcutover_ddl_start ON ddl_command_start
    WHEN TAG IN ('CREATE INDEX', 'DROP INDEX', 'ALTER TABLE') EXECUTE PROCEDURE pgcutover.on_ddl();
CREATE EVENT TRIGGER pgcutover_ddl_rewrite ON table_rewrite EXECUTE PROCEDURE pgcutover.on_ddl();
CREATE EVENT TRIGGER pgcutover_ddl_end ON ddl_command_end EXECUTE PROCEDURE pgcutover.on_ddl();
CREATE EVENT TRIGGER pgcutover_ddl_drop ON sql_drop EXECUTE PROCEDURE pgcutover.on_ddl();

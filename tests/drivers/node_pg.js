// node-postgres on one connection across a cutover. See README.md in this directory.
"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { Client } = require("pg");

const DRIVER = "node-pg";
const directory = process.env.DRIVER_DIR;
const file = (name) => path.join(directory, name);
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function main() {
  const client = new Client({ application_name: "driver-node-pg" });
  let ended = false;
  client.on("error", (error) => fail(error));
  client.on("end", () => { if (!ended) fail(new Error("connection lost")); });
  await client.connect();
  const one = async (text, values) => Object.values((await client.query(text, values)).rows[0])[0];

  const port = await one("SELECT inet_server_port()");
  const pid = await one("SELECT pg_backend_pid()");
  await client.query('SET search_path TO shop, "$user", public; SET TimeZone TO \'Asia/Kolkata\'');
  await client.query("SELECT set_config('app.driver', $1, false)", ["it's " + DRIVER]);
  await client.query("LISTEN driver_node_pg");
  const heard = new Promise((resolve) => client.on("notification", (message) => resolve(message.payload)));

  // A statement with a name is prepared once and only bound after that.
  const insert = (n, mood, note) => client.query({
    name: "insert it's",
    text: "INSERT INTO driver_writes (driver, n, mood, note) VALUES ($1, $2, $3, $4)",
    values: [DRIVER, n, mood, note],
  });

  let acknowledged = 0;
  const work = async (count) => {
    for (let round = 0; round < count; round += 1) {
      const n = acknowledged;
      if (n % 5 === 0) {
        await client.query("BEGIN");
        await insert(n + 1, "glad", "transaction");
        await insert(n + 2, "sad", "transaction");
        await client.query("COMMIT");
        acknowledged += 2;
      } else if (n % 5 === 2) {
        // Several commands in one simple query are one transaction.
        await client.query(`INSERT INTO driver_writes VALUES ('${DRIVER}', ${n + 1}, 'glad', 'simple');
          INSERT INTO driver_writes VALUES ('${DRIVER}', ${n + 2}, 'sad', 'simple')`);
        acknowledged += 2;
      } else {
        await client.query("BEGIN");
        await insert(n + 1, "glad", "undone");
        await client.query("ROLLBACK");
        // Queued without waiting: they run one after the other.
        await Promise.all([
          insert(n + 1, "glad", "autocommit"),
          client.query("SELECT count(*) FROM driver_writes WHERE driver = $1", [DRIVER]),
        ]);
        acknowledged += 1;
      }
      const newest = await one("SELECT max(n) FROM driver_writes WHERE driver = $1", [DRIVER]);
      assert.equal(newest, acknowledged);
      await pause(2);
    }
  };

  await work(20);
  fs.writeFileSync(file("ready"), "");
  while (!fs.existsSync(file("switched"))) await work(5);
  await work(40);

  const expectedPort = Number(fs.readFileSync(file("switched"), "utf8"));
  const nowPort = await one("SELECT inet_server_port()");
  assert.equal(nowPort, expectedPort, "the port of the server");
  assert(nowPort === port || (await one("SELECT pg_backend_pid()")) !== pid, "still on the old backend");
  assert.equal(await one("SELECT current_setting('app.driver')"), "it's " + DRIVER);
  assert.equal(await one("SHOW search_path"), 'shop, "$user", public');
  assert.equal(await one("SHOW TimeZone"), "Asia/Kolkata");
  assert.equal(await one("SHOW application_name"), "driver-node-pg");
  assert.equal(await one("SELECT count(*)::int FROM pg_prepared_statements WHERE name = 'insert it''s'"), 1);
  await client.query("NOTIFY driver_node_pg, 'still there'");
  assert.equal(await Promise.race([heard, pause(10000)]), "still there");
  const numbers = await client.query("SELECT n FROM driver_writes WHERE driver = $1 ORDER BY n", [DRIVER]);
  assert.deepEqual(numbers.rows.map((row) => row.n), Array.from({ length: acknowledged }, (_, index) => index + 1));
  ended = true;
  await client.end();
  console.log(`ACKNOWLEDGED ${acknowledged}`);
  console.log("PASS");
}

function fail(error) {
  console.log(`FAIL ${error.name}: ${error.message}`);
  process.exit(1);
}

main().catch(fail);

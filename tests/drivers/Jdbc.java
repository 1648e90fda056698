// pgJDBC on one connection across a cutover. See README.md in this directory. Run as a single source file:
// java -cp postgresql.jar Jdbc.java

import java.io.StringReader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Properties;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;

public class Jdbc {
    static final String DRIVER = "pgjdbc";

    final Path directory = Path.of(System.getenv("DRIVER_DIR"));
    final Connection connection;
    final PreparedStatement insert;
    final PreparedStatement newest;
    int acknowledged = 0;

    public static void main(String[] arguments) {
        try {
            new Jdbc().run();
        } catch (Throwable error) {
            System.out.println("FAIL " + error.getClass().getSimpleName() + ": " + error.getMessage());
            System.exit(1);
        }
    }

    Jdbc() throws SQLException {
        Properties properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        String password = System.getenv("PGPASSWORD");
        if (password != null) {
            properties.setProperty("password", password);
        }
        properties.setProperty("ApplicationName", "driver-pgjdbc");
        // Named statements on the server from the first execution on; strings of no declared type, for the enum.
        properties.setProperty("prepareThreshold", "1");
        properties.setProperty("stringtype", "unspecified");
        String address = System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        connection = DriverManager.getConnection("jdbc:postgresql://" + address, properties);
        try (Statement statement = connection.createStatement()) {
            statement.execute("SET search_path TO shop, \"$user\", public");
            statement.execute("SET TimeZone TO 'Asia/Kolkata'");
            statement.execute("LISTEN driver_pgjdbc");
        }
        try (PreparedStatement set = connection.prepareStatement("SELECT set_config('app.driver', ?, false)")) {
            set.setString(1, "it's " + DRIVER);
            set.executeQuery().close();
        }
        insert = connection.prepareStatement("INSERT INTO driver_writes (driver, n, mood, note) VALUES (?, ?, ?, ?)");
        newest = connection.prepareStatement("SELECT max(n) FROM driver_writes WHERE driver = ?");
    }

    void run() throws Exception {
        String port = text("SELECT inet_server_port()");
        String pid = text("SELECT pg_backend_pid()");
        work(20);
        Files.createFile(directory.resolve("ready"));
        Path switched = directory.resolve("switched");
        while (!Files.exists(switched)) {
            work(5);
        }
        work(40);

        String expectedPort = Files.readString(switched).trim();
        check(expectedPort, text("SELECT inet_server_port()"));
        if (!expectedPort.equals(port) && text("SELECT pg_backend_pid()").equals(pid)) {
            throw new IllegalStateException("still on the old backend");
        }
        check("it's " + DRIVER, text("SELECT current_setting('app.driver')"));
        check("shop, \"$user\", public", text("SHOW search_path"));
        check("Asia/Kolkata", text("SHOW TimeZone"));
        check("driver-pgjdbc", text("SHOW application_name"));
        check("true", connection.isValid(5) + "");
        try (Statement statement = connection.createStatement()) {
            statement.execute("NOTIFY driver_pgjdbc, 'still there'");
        }
        PGNotification[] heard = connection.unwrap(PGConnection.class).getNotifications(10_000);
        check("still there", heard == null || heard.length == 0 ? "nothing" : heard[0].getParameter());
        check(acknowledged + "|1|" + acknowledged,
            text("SELECT count(*) || '|' || min(n) || '|' || max(n) FROM driver_writes WHERE driver = 'pgjdbc'"));
        connection.close();
        System.out.println("ACKNOWLEDGED " + acknowledged);
        System.out.println("PASS");
    }

    void work(int count) throws Exception {
        for (int round = 0; round < count; round++) {
            int n = acknowledged;
            switch (n % 5) {
                case 0 -> {
                    connection.setAutoCommit(false);
                    insert(n + 1, "glad", "transaction");
                    insert(n + 2, "sad", "transaction");
                    connection.commit();
                    connection.setAutoCommit(true);
                    acknowledged += 2;
                }
                case 2 -> {
                    for (int extra = 1; extra <= 3; extra++) {
                        bind(n + extra, "glad", "batch");
                        insert.addBatch();
                    }
                    // All in one transaction: the driver sends one Sync.
                    insert.executeBatch();
                    acknowledged += 3;
                }
                case 3 -> {
                    String row = DRIVER + "\t" + (n + 1) + "\tsad\tcopy\n";
                    connection.unwrap(PGConnection.class).getCopyAPI()
                        .copyIn("COPY driver_writes (driver, n, mood, note) FROM STDIN", new StringReader(row));
                    acknowledged += 1;
                }
                default -> {
                    connection.setAutoCommit(false);
                    insert(n + 1, "glad", "undone");
                    connection.rollback();
                    connection.setAutoCommit(true);
                    insert(n + 1, "glad", "autocommit");
                    acknowledged += 1;
                }
            }
            newest.setString(1, DRIVER);
            try (ResultSet rows = newest.executeQuery()) {
                rows.next();
                check(acknowledged + "", rows.getString(1));
            }
            // Read in parts, through a portal that is suspended.
            connection.setAutoCommit(false);
            try (PreparedStatement parts = connection.prepareStatement("SELECT n FROM driver_writes WHERE driver = ? LIMIT 30")) {
                parts.setFetchSize(10);
                parts.setString(1, DRIVER);
                try (ResultSet rows = parts.executeQuery()) {
                    while (rows.next()) {
                        rows.getInt(1);
                    }
                }
            }
            connection.commit();
            connection.setAutoCommit(true);
            Thread.sleep(2);
        }
    }

    void bind(int n, String mood, String note) throws SQLException {
        insert.setString(1, DRIVER);
        insert.setInt(2, n);
        insert.setString(3, mood);
        insert.setString(4, note);
    }

    void insert(int n, String mood, String note) throws SQLException {
        bind(n, mood, note);
        insert.executeUpdate();
    }

    String text(String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet rows = statement.executeQuery(sql)) {
            rows.next();
            return rows.getString(1);
        }
    }

    static void check(String expected, String found) {
        if (!expected.equals(found)) {
            throw new IllegalStateException("expected " + expected + ", found " + found);
        }
    }
}

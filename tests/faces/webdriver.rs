//! A small WebDriver client (W3C WebDriver) for a headless Chromium: as much of it as clicking through a page needs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// For a page that waits for servers of a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The key under which WebDriver passes an element's name (section 11 of the standard).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one page. Dropped: ended.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
    screenshots: PathBuf,
}

/// The first of these programs on the PATH.
fn find(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    names
        .iter()
        .flat_map(|name| directories.iter().map(move |directory| directory.join(name)))
        .find(|file| file.is_file())
}

impl Browser {
    /// Starts one; an error says what is missing on this machine.
    fn start(screenshots: &str) -> Result<Self, String> {
        let driver = find(&["chromedriver"]).ok_or("chromedriver is not installed (Debian: chromium-driver)")?;
        let chromium = find(&["chromium", "chromium-browser", "google-chrome"])
            .ok_or("no Chromium is installed (Debian: chromium)")?;
        let screenshots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("screenshots").join(screenshots);
        std::fs::create_dir_all(&screenshots).expect("the target directory is writable");
        let mut driver = Command::new(driver)
            .args(["--port=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver can be run");
        let mut lines = BufReader::new(driver.stdout.take().expect("it is piped")).lines();
        let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let text = line.split_once("started successfully on port ")?.1;
            text.trim_end_matches('.').parse().ok()
        });
        let port = port.expect("chromedriver says its port");
        let profile = tempfile::tempdir().expect("a temporary directory");
        let mut arguments = vec![
            "--headless=new".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--window-size=1280,1500".to_owned(),
            format!("--user-data-dir={}", profile.path().display()),
        ];
        // Chromium's sandbox does not work as root, which is who runs in many containers.
        let root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
        arguments.extend(root.then(|| "--no-sandbox".to_owned()));
        let mut browser = Self { driver, port, session: String::new(), _profile: profile, screenshots };
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "binary": chromium, "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let made = browser.call("POST", "/session", &wanted).expect("a session can be made");
        browser.session = made["sessionId"].as_str().expect("it has a name").to_owned();
        Ok(browser)
    }

    /// One call of the protocol.
    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).expect("chromedriver runs");
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{}\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            self.port,
            body.len()
        );
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket has one");
        stream.write_all(format!("{head}{body}").as_bytes()).expect("chromedriver listens");
        // chromedriver keeps the connection open whatever it is asked, so the length must be heeded.
        let mut reader = BufReader::new(stream);
        let (mut status, mut length, mut line) = (String::new(), 0, String::new());
        while reader.read_line(&mut line).is_ok_and(|count| count > 0) && !line.trim().is_empty() {
            if status.is_empty() {
                status = line.split(' ').nth(1).unwrap_or_default().to_owned();
            } else if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().expect("a length");
            }
            line.clear();
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("chromedriver answers");
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        if status == "200" { Ok(body["value"].clone()) } else { Err(body["value"].to_string()) }
    }

    fn on(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        self.call(method, &format!("/session/{}{path}", self.session), body)
    }

    /// A browser; none: there is none here, and the reason is said aloud.
    pub fn found(name: &str) -> Option<Self> {
        match Self::start(name) {
            Ok(browser) => Some(browser),
            Err(missing) => {
                println!("not run: {missing}");
                eprintln!("{name}: not run: {missing}");
                None
            }
        }
    }

    pub fn open(&self, address: &str) {
        self.on("POST", "/url", &json!({ "url": address })).expect("the page can be opened");
    }

    /// What `script` returns, a function's body.
    pub fn run(&self, script: &str) -> Value {
        let body = json!({ "script": script, "args": [] });
        self.on("POST", "/execute/sync", &body).unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    pub fn resize(&self, width: u32, height: u32) {
        self.on("POST", "/window/rect", &json!({ "width": width, "height": height })).expect("a window has a size");
    }

    fn element(&self, selector: &str) -> Result<String, String> {
        let found = self.on("POST", "/element", &json!({ "using": "css selector", "value": selector }))?;
        found[ELEMENT].as_str().map(str::to_owned).ok_or_else(|| format!("{found} is no element"))
    }

    /// Tries until it works: a page that lives draws itself anew in between.
    fn until<T>(&self, what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt() {
                Ok(done) => return done,
                Err(error) if Instant::now() > deadline => {
                    self.screenshot("failed");
                    let page = self.run("return document.body.innerText");
                    panic!("{what}: {error}\nthe page:\n{}", page.as_str().unwrap_or_default());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Clicks as a person does: the element must be there, be seen and not be covered.
    pub fn click(&self, selector: &str) {
        self.until(&format!("click {selector}"), || {
            let element = self.element(selector)?;
            self.on("POST", &format!("/element/{element}/click"), &json!({})).map(drop)
        });
    }

    pub fn type_into(&self, selector: &str, text: &str) {
        self.until(&format!("type into {selector}"), || {
            let element = self.element(selector)?;
            self.on("POST", &format!("/element/{element}/value"), &json!({ "text": text })).map(drop)
        });
    }

    /// Presses keys, whatever has the focus.
    pub fn press(&self, keys: &str) {
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key.to_string() })))
            .collect();
        let body = json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] });
        self.on("POST", "/actions", &body).expect("keys can be pressed");
    }

    /// The text of the first element that fits, once it contains `part`.
    pub fn wait_for(&self, selector: &str, part: &str) -> String {
        self.until(&format!("{selector} with {part:?}"), || {
            let element = self.element(selector)?;
            let text = self.on("GET", &format!("/element/{element}/text"), &Value::Null)?;
            let text = text.as_str().unwrap_or_default().to_owned();
            if text.contains(part) { Ok(text) } else { Err(format!("it is {text:?}")) }
        })
    }

    /// Keeps what is seen as an artefact of the test.
    pub fn screenshot(&self, name: &str) {
        let Ok(picture) = self.on("GET", "/screenshot", &Value::Null) else { return };
        let bytes = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, picture.as_str().unwrap_or_default());
        let file = self.screenshots.join(format!("{name}.png"));
        std::fs::write(file, bytes.unwrap_or_default()).expect("the target directory is writable");
    }

    /// What the page has written to the console, errors and warnings. An answer of 503 is none: a daemon says so that it
    /// cannot tell just now, and the page asks again.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.on("POST", "/se/log", &json!({ "type": "browser" })).expect("the console can be read");
        let entries = log.as_array().cloned().unwrap_or_default();
        let bad = entries.iter().filter(|entry| entry["level"] == "SEVERE" || entry["level"] == "WARNING");
        let messages = bad.map(|entry| entry["message"].to_string());
        messages.filter(|message| !message.contains("status of 503")).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.on("DELETE", "", &Value::Null);
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

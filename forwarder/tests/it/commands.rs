//! The commands beside those that open tunnels, and the config files.

use std::{fs, path::Path};

use futures_util::StreamExt;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio_tungstenite::accept_async;

use crate::harness::{Agent, Ended, Service, Ttf};

async fn ttf(home: &Path, arguments: &[&str]) -> Ended {
    Ttf::start_in(home.to_str().expect("a path"), arguments)
        .ended()
        .await
}

#[tokio::test]
async fn after_a_login_a_tunnel_needs_no_endpoint() {
    let home = tempfile::tempdir().expect("a directory");
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let login = ttf(home.path(), &["login", &service.endpoint]).await;
    assert_eq!(login.code, Some(0), "{:?}", login.stderr);
    assert!(
        login.stdout[0].contains("needs no token"),
        "{:?}",
        login.stdout
    );

    let path = home.path().to_str().expect("a path");
    let mut tunnel = Ttf::start_in(path, &["1", "--remember=false"]);
    tunnel.until_line("online: ").await;
}

#[tokio::test]
async fn a_logout_forgets_what_a_login_has_stored() {
    let home = tempfile::tempdir().expect("a directory");
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let endpoint = &service.endpoint;
    for arguments in [
        &["login", endpoint, "--token", "hunter2"][..],
        &["login", endpoint, "--service", "work"],
    ] {
        let login = ttf(home.path(), arguments).await;
        assert_eq!(login.code, Some(0), "{:?}", login.stderr);
    }
    let out = ttf(home.path(), &["logout"]).await;
    assert_eq!(out.code, Some(0), "{:?}", out.stderr);
    let said = out.stdout.join("\n");
    assert!(
        said.starts_with(endpoint) && said.contains("revoke") && !said.contains("hunter2"),
        "{said}"
    );
    let file = home.path().join("ttf/config.toml");
    let kept = fs::read_to_string(&file).expect("a file");
    assert_eq!(
        kept.trim_start(),
        format!("[services.work]\nendpoint = \"{endpoint}\"\n")
    );
    let again = ttf(home.path(), &["logout"]).await;
    assert_eq!(again.code, Some(0), "{:?}", again.stderr);
    assert!(
        again.stdout[0].contains("no endpoint"),
        "{:?}",
        again.stdout
    );

    let unknown = ttf(home.path(), &["logout", "--service", "home"]).await;
    assert_eq!(unknown.code, Some(2));
    assert!(
        unknown.stderr[0].ends_with("they have: work"),
        "{:?}",
        unknown.stderr
    );
    let work = ttf(home.path(), &["logout", "--service", "work"]).await;
    assert_eq!(work.code, Some(0), "{:?}", work.stderr);
    assert_eq!(fs::read_to_string(&file).expect("a file").trim(), "");
    let none = ttf(home.path(), &["http", "1", "--service", "work"]).await;
    assert_eq!(none.code, Some(2));
    assert!(
        none.stderr[0].contains("ttf login ENDPOINT --service work"),
        "{:?}",
        none.stderr
    );
}

#[tokio::test]
async fn a_released_tunnel_id_is_not_remembered() {
    let home = tempfile::tempdir().expect("a directory");
    let service = Service::running(|stream| async move {
        let mut agent = Agent(accept_async(stream).await.expect("a handshake"));
        let Some(Ok(first)) = agent.0.next().await else {
            return;
        };
        let is_release = first.to_string().contains("release");
        let answer = if is_release {
            json!({ "type": "released", "tunnel_id": "my-app", "existed": true })
        } else {
            json!({
                "type": "connection_established", "connection_id": "c1", "tunnel_id": "my-app",
                "public_url": "http://t.example.com/my-app", "features": [],
            })
        };
        agent.send(answer).await;
        agent.until_closed().await;
    })
    .await;
    let path = home.path().to_str().expect("a path");
    let mut tunnel = Ttf::start_in(path, &["http", "1", "-e", &service.endpoint]);
    tunnel.until_line("online: ").await;
    tunnel.signal(Signal::TERM);
    assert_eq!(tunnel.ended().await.code, Some(0));
    let remembered = || fs::read_to_string(home.path().join("ttf/tunnels.toml")).expect("a file");
    assert!(remembered().contains("my-app"), "{}", remembered());

    let released = ttf(home.path(), &["release", "my-app", "-e", &service.endpoint]).await;
    assert_eq!(released.code, Some(0), "{:?}", released.stderr);
    // Otherwise the next start would claim it again.
    assert!(!remembered().contains("my-app"), "{}", remembered());
}

#[tokio::test]
async fn the_status_of_an_id_whose_address_does_not_follow_from_the_endpoint_is_a_usage_error() {
    let home = tempfile::tempdir().expect("a directory");
    let endpoint = "wss://abc.execute-api.us-east-1.amazonaws.com/prod";
    let status = ttf(home.path(), &["status", "my-app", "-e", endpoint]).await;
    assert_eq!(status.code, Some(2), "{:?}", status.stderr);
    assert!(
        status.stderr[0].contains("pass the tunnel's public URL"),
        "{:?}",
        status.stderr
    );
}

/// What `ttf service install` says with this config file, environment and flags, where systemd takes every command.
#[cfg(target_os = "linux")]
async fn installed(config: &str, environment: &[(&str, &str)], flags: &[&str]) -> String {
    use std::os::unix::fs::PermissionsExt;

    let home = tempfile::tempdir().expect("a directory");
    let systemctl = home.path().join("systemctl");
    fs::write(&systemctl, "#!/bin/sh\nexit 0\n").expect("written");
    fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o700)).expect("executable");
    let file = home.path().join("tunnels.toml");
    fs::write(&file, config).expect("written");
    let [home, file] = [home.path(), &file].map(|path| path.to_str().expect("a path"));
    let mut all = vec![("XDG_CONFIG_HOME", home), ("HOME", home), ("PATH", home)];
    all.extend(environment);
    let arguments = ["service", "install", "--config", file];
    let ended = Ttf::start_with(&all, &[&arguments[..], flags].concat())
        .ended()
        .await;
    assert_eq!(ended.code, Some(0), "{:?}", ended.stderr);
    ended.stdout.join("\n")
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn installing_a_service_warns_of_a_proxy_that_it_will_not_see() {
    const PROXY: &str = "http://proxy.example.com:3128";
    let https = [("HTTPS_PROXY", PROXY)];
    let elsewhere = [("HTTPS_PROXY", PROXY), ("NO_PROXY", "x.example.com")];
    let own = [("TTF_PROXY", PROXY)];
    let flag = ["--proxy", PROXY];
    let one = "endpoint = 'wss://x.example.com'\n[tunnels.web]\n";
    let unused =
        format!("{one}[services.other]\nendpoint = 'wss://y.example.com'\nproxy = 'http://y:1'\n");
    let another = format!("{one}[tunnels.api]\nproxy = 'http://y:1'\n");
    let all = format!("proxy = 'http://y:1'\n{one}");
    let used = "service = 'x'\n[services.x]\nendpoint = 'wss://x.example.com'\nproxy = 'http://y:1'\n[tunnels.web]\n";
    let direct = format!("proxy = 'none'\n{one}");
    for (config, environment, flags, is_lost) in [
        (one, &https[..], &[][..], true),
        (one, &own, &[], true),
        (one, &[], &flag, true),
        (&unused, &https, &[], true),
        (&another, &https, &[], true),
        (one, &[], &[], false),
        (one, &elsewhere, &[], false),
        (one, &https, &["--proxy", "none"], false),
        (&all, &https, &[], false),
        (used, &https, &[], false),
        (&direct, &https, &[], false),
    ] {
        let said = installed(config, environment, flags).await;
        let case = format!("{config}{environment:?} {flags:?}: {said}");
        assert_eq!(said.contains("does not see"), is_lost, "{case}");
        assert!(said.contains("is installed and started"), "{case}");
        assert!(!said.contains("3128"), "{case}");
    }
}

#[tokio::test]
async fn a_login_that_is_refused_stores_nothing() {
    let home = tempfile::tempdir().expect("a directory");
    for (status, code) in [("401 Unauthorized", 3), ("404 Not Found", 1)] {
        let service = Service::refusing(status).await;
        let login = ttf(
            home.path(),
            &["login", &service.endpoint, "--token", "hunter2"],
        )
        .await;
        let said = login.stderr.join("\n");
        assert_eq!(login.code, Some(code), "{said}");
        assert!(
            said.contains("nothing is stored") && !said.contains("hunter2"),
            "{said}"
        );
        assert!(!home.path().join("ttf").exists());
    }
    let service = Service::refusing("401 Unauthorized").await;
    let login = ttf(home.path(), &["login", &service.endpoint]).await;
    assert_eq!(login.code, Some(3));
    assert!(
        login.stderr.join("\n").contains("requires a token"),
        "{:?}",
        login.stderr
    );
}

#[tokio::test]
async fn files_are_merged_and_named() {
    let home = tempfile::tempdir().expect("a directory");
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    fs::create_dir(home.path().join("ttf")).expect("a directory");
    let users = home.path().join("ttf/config.toml");
    let endpoint = &service.endpoint;
    fs::write(
        &users,
        format!("endpoint = '{endpoint}'\nremember = false\n"),
    )
    .expect("written");
    let projects = home.path().join("project.toml");
    fs::write(&projects, "[tunnels.web]\nport = 1\n").expect("written");
    let (users, projects) = (users.display().to_string(), projects.display().to_string());

    let path = home.path().to_str().expect("a path");
    let mut tunnel = Ttf::start_in(path, &["start", "web", "--config", &projects]);
    tunnel
        .until_line(&format!("config: {users}, {projects}"))
        .await;
    tunnel.until_line("online: ").await;

    let checked = ttf(home.path(), &["config", "check", "-c", &projects]).await;
    assert_eq!(checked.code, Some(0), "{:?}", checked.stderr);
    let said = checked.stdout.join("\n");
    assert!(said.contains("tunnel web: http://127.0.0.1:1"), "{said}");
    let path = ttf(home.path(), &["config", "path"]).await;
    assert_eq!(path.stdout, [users]);

    // A check finds what a start would, with the flags of the start.
    let alone = |name: &str, text: &str| {
        let file = home.path().join(name);
        fs::write(&file, text).expect("written");
        file.display().to_string()
    };
    let levels = alone("levels.toml", "log_level = 'loud'\n");
    let header = alone("header.toml", "header = ['x']\n");
    for (file, key) in [(&levels, "log_level"), (&header, "header")] {
        let checked = ttf(home.path(), &["config", "check", "-c", file]).await;
        assert_eq!(checked.code, Some(2), "{:?}", checked.stdout);
        assert!(checked.stderr[0].contains(key), "{:?}", checked.stderr);
    }
    fs::remove_file(home.path().join("ttf/config.toml")).expect("removed");
    let flags = ["config", "check", "-c", &projects, "-e", "127.0.0.1:9"];
    let checked = ttf(home.path(), &flags).await;
    assert_eq!(checked.code, Some(0), "{:?}", checked.stderr);
}

#[tokio::test]
async fn a_fault_in_a_file_is_shown_with_its_line() {
    let home = tempfile::tempdir().expect("a directory");
    fs::create_dir(home.path().join("ttf")).expect("a directory");
    let file = home.path().join("ttf/config.toml");
    fs::write(&file, "\n  targt = 3000\n").expect("written");
    let ended = ttf(home.path(), &["http", "3000"]).await;
    assert_eq!(ended.code, Some(2));
    let place = format!(
        "error: {}:2:3: unknown key `targt`; did you mean `target`?",
        file.display()
    );
    assert_eq!(
        ended.stderr[..],
        [place.as_str(), "  2 |   targt = ...", "    |   ^^^^^"]
    );
    // Nothing of that is needed to find and mend it.
    for command in [
        &["config", "path"][..],
        &["version"],
        &["completions", "bash"],
    ] {
        assert_eq!(ttf(home.path(), command).await.code, Some(0), "{command:?}");
    }
}

#[tokio::test]
async fn an_editor_is_given_a_file_of_the_users_own() {
    let home = tempfile::tempdir().expect("a directory");
    let edited = ttf(home.path(), &["config", "edit", "--editor", "/bin/cat"]).await;
    assert_eq!(edited.code, Some(0), "{:?}", edited.stderr);
    assert!(
        edited
            .stdout
            .iter()
            .any(|line| line.contains("[tunnels.web]")),
        "{:?}",
        edited.stdout
    );
    let failed = ttf(home.path(), &["config", "edit", "--editor", "/bin/false"]).await;
    assert_eq!(failed.code, Some(2));
    assert!(failed.stderr[0].contains("EDITOR"), "{:?}", failed.stderr);
}

#[tokio::test]
async fn documents_are_printed_whole() {
    let home = Path::new("/nonexistent");
    for (arguments, words) in [
        (&["version"][..], "ttf "),
        (&["completions", "bash"], "complete -F _ttf"),
        (&["completions", "zsh"], "#compdef ttf"),
        (&["completions", "fish"], "complete -c ttf"),
        (&["man"], ".SH \"EXIT STATUS\""),
    ] {
        let ended = ttf(home, arguments).await;
        assert_eq!(ended.code, Some(0), "{arguments:?}");
        let said = ended.stdout.join("\n");
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn a_diagnosis_names_each_step_and_fails_if_one_does() {
    let home = Path::new("/nonexistent");
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let origin = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = origin.local_addr().expect("an address").port().to_string();
    let good = ttf(
        home,
        &["diagnose", &port, "-e", &service.endpoint, "--json"],
    )
    .await;
    assert_eq!(good.code, Some(0), "{:?}", good.stdout);
    let said: Value = serde_json::from_str(&good.stdout.join("\n")).expect("JSON");
    assert_eq!(said["ok"], true, "{said}");
    let steps = said["steps"].as_array().expect("steps");
    let names: Vec<&str> = steps
        .iter()
        .filter_map(|step| step["step"].as_str())
        .collect();
    assert_eq!(
        names,
        [
            "version",
            "endpoint",
            "name",
            "connection",
            "handshake",
            "clock",
            "ping",
            "target"
        ]
    );
    // A port that is taken, and at which nobody listens.
    let closed = TcpSocket::new_v4().expect("a socket");
    closed
        .bind("127.0.0.1:0".parse().expect("an address"))
        .expect("a port");
    let address = closed.local_addr().expect("an address");
    let port = address.port().to_string();
    let bad = ttf(home, &["diagnose", &port, "-e", &service.endpoint]).await;
    assert_eq!(bad.code, Some(1));
    let target = bad.stdout.last().expect("a line");
    assert!(target.starts_with("[FAIL] target"), "{target}");
}

#[tokio::test]
async fn health_is_asked_of_this_users_agents_and_of_no_other() {
    let (mine, other) = (
        tempfile::tempdir().expect("a directory"),
        tempfile::tempdir().expect("a directory"),
    );
    let path = |home: &tempfile::TempDir| home.path().to_str().expect("a path").to_owned();
    let open = |home: &str, service: &Service, port: &'static str| {
        let arguments = ["http", port, "-e", &service.endpoint, "--remember=false"];
        Ttf::start_in(home, &[&arguments[..], &["--inspect=true"]].concat())
    };
    let good = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let mut others = open(&path(&other), &good, "1");
    others.until_line("online: ").await;
    let none = ttf(mine.path(), &["health"]).await;
    assert_eq!(none.code, Some(1));
    let said = none.stderr.join("\n");
    assert!(
        said.starts_with("error: no agent of this user runs here"),
        "{said}"
    );

    let bad = Service::refusing("503 Service Unavailable").await;
    let mut first = open(&path(&mine), &good, "1");
    first.until_line("online: ").await;
    let mut second = open(&path(&mine), &bad, "2");
    second.until_line("inspector: http://").await;
    // Until then it is connecting.
    second.until_line("offline: ").await;
    let reconnecting = ttf(mine.path(), &["health"]).await;
    assert_eq!(reconnecting.code, Some(1));
    assert_eq!(reconnecting.stderr, ["error: the agent is reconnecting"]);
    second.signal(Signal::TERM);
    second.ended().await;
    let online = ttf(mine.path(), &["health"]).await;
    assert_eq!(
        (online.code, online.stdout),
        (Some(0), vec!["online".to_owned()])
    );
}

#[tokio::test]
async fn a_diagnosis_without_a_target_tries_those_of_the_file() {
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let origin = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let open = origin.local_addr().expect("an address").port();
    // A port that is taken, and at which nobody listens.
    let socket = TcpSocket::new_v4().expect("a socket");
    let any = "127.0.0.1:0".parse().expect("an address");
    socket.bind(any).expect("a port");
    let closed = socket.local_addr().expect("an address").port();
    let home = tempfile::tempdir().expect("a directory");
    let file = home.path().join("tunnels.toml");
    fs::write(
        &file,
        format!("[tunnels.a]\ntarget = {closed}\n[tunnels.b]\ntarget = {open}\n"),
    )
    .expect("written");
    let file = file.to_str().expect("a path");
    let both = ttf(
        home.path(),
        &["diagnose", "-e", &service.endpoint, "-c", file],
    )
    .await;
    let targets: Vec<&str> = both
        .stdout
        .iter()
        .filter(|line| line.contains(" target "))
        .map(|line| &line[..6])
        .collect();
    assert_eq!(targets, ["[FAIL]", "[ OK ]"], "{:?}", both.stdout);
}

#[tokio::test]
async fn health_is_what_the_running_agent_says_of_its_tunnels() {
    let home = Path::new("/nonexistent");
    let service = Service::online("http://t.example.com/my-app", Agent::until_closed).await;
    let mut agent = Ttf::tunnel(&service, &["--inspect", "0"]);
    let address = agent.until_line("inspector: http://").await;
    agent.until_line("online: ").await;
    let good = ttf(home, &["health", "--inspect", &address]).await;
    assert_eq!(
        (good.code, good.stdout),
        (Some(0), vec!["online".to_owned()])
    );

    agent.signal(Signal::TERM);
    agent.ended().await;
    let gone = ttf(home, &["health", "--inspect", &address]).await;
    assert_eq!(gone.code, Some(1));
    let said = gone.stderr.join("\n");
    let expected = format!("error: no agent answers at {address}: ");
    assert!(said.starts_with(&expected), "{said}");

    let unavailable = Service::refusing("503 Service Unavailable").await;
    let mut agent = Ttf::tunnel(&unavailable, &["--inspect", "0"]);
    let address = agent.until_line("inspector: http://").await;
    let bad = ttf(home, &["health", "--inspect", &address]).await;
    assert_eq!(bad.code, Some(1));
    assert_eq!(bad.stderr, ["error: the agent is reconnecting"]);
}

use super::*;
use crate::{settings::AcceptedCertificates, tunnel_ids};

fn parse(arguments: &[&str]) -> Result<Vec<Settings>, String> {
    let cli = Cli::try_parse_from([&["ttf"], arguments].concat()).expect("a command line");
    match cli.invocation(None) {
        Ok(Invocation {
            action: Action::Open(tunnels),
            ..
        }) => Ok(tunnels),
        Ok(other) => panic!("not tunnels: {other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

#[test]
fn the_bare_command_tunnels_port_3000() {
    let tunnels = parse(&[
        "--endpoint",
        "ws://127.0.0.1:1/_ws",
        "--tunnel-id",
        "my-app",
    ])
    .expect("settings");
    assert_eq!(tunnels[0].target.to_string(), "http://127.0.0.1:3000");
    assert_eq!(
        tunnels[0].tunnel_id.as_ref().map(TunnelId::as_str),
        Some("my-app")
    );
}

#[test]
fn flags_override_the_file() {
    let file = file("endpoint = 'wss://file.example.com'\ntarget = 1\ntunnel_id = 'from-file'\n");
    let path = file.path().to_str().expect("a path");
    let from_file = parse(&["--config", path]).expect("settings");
    assert_eq!(from_file[0].target.to_string(), "http://127.0.0.1:1");
    let from_flags = parse(&[
        "http",
        "2",
        "--config",
        path,
        "-e",
        "wss://flag.example.com",
    ])
    .expect("settings");
    assert_eq!(
        from_flags[0].endpoint.to_string(),
        "wss://flag.example.com/"
    );
    assert_eq!(from_flags[0].target.to_string(), "http://127.0.0.1:2");
    assert_eq!(
        from_flags[0].tunnel_id.as_ref().map(TunnelId::as_str),
        Some("from-file")
    );
}

#[test]
fn a_random_id_is_remembered_unless_remembering_is_off() {
    let arguments = ["-e", "ws://127.0.0.1:1"];
    let memory = |more: &[&str]| {
        parse(&[&arguments[..], more].concat()).expect("settings")[0]
            .memory
            .clone()
    };
    assert_eq!(memory(&[]), tunnel_ids::default_file());
    assert!(tunnel_ids::default_file().is_some_and(|file| file.ends_with("ttf/tunnels.toml")));
    assert_eq!(memory(&["--remember", "false"]), None);
    let file = file("remember = false\n");
    assert_eq!(
        memory(&["--config", file.path().to_str().expect("a path")]),
        None
    );
}

#[test]
fn start_opens_the_named_tunnels() {
    let file = file(
        "endpoint = 'wss://x.example.com'\n[tunnels.api]\ntarget = 1\n[tunnels.web]\ntarget = 2\n",
    );
    let path = file.path().to_str().expect("a path");
    let names = |arguments: &[&str]| {
        parse(arguments).map(|tunnels| {
            tunnels
                .into_iter()
                .map(|tunnel| tunnel.name)
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(
        names(&["start", "--all", "--config", path]),
        Ok(vec!["api".to_owned(), "web".to_owned()])
    );
    assert_eq!(
        names(&["start", "web", "--config", path]),
        Ok(vec!["web".to_owned()])
    );
    for wrong in [
        &["start", "--config", path][..],
        &["start", "nope", "--config", path],
        &["--config", path],
        &["start", "--all", "-s", "one", "--config", path],
    ] {
        assert!(names(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn the_target_may_be_a_flag() {
    for arguments in [&["-p", "2"][..], &["http", "--target", "2"], &["http", "2"]] {
        let tunnels = parse(&[arguments, &["-e", "ws://127.0.0.1:1"]].concat()).expect("settings");
        assert_eq!(
            tunnels[0].target.to_string(),
            "http://127.0.0.1:2",
            "{arguments:?}"
        );
    }
}

#[test]
fn visitor_rules_come_from_flags_or_the_file_and_errors_reveal_no_secret() {
    let file = file(
        "endpoint = 'wss://x.example.com'\nbasic_auth = ['all:swordfish']\n\
         [tunnels.api]\nbasic_auth = []\nallow = ['192.0.2.0/24']\n[tunnels.web]\nrequire_header = ['x-key: swordfish']\n",
    );
    let path = file.path().to_str().expect("a path");
    let rules = |arguments: &[&str]| {
        let tunnels = parse(&[arguments, &["--config", path]].concat()).expect("settings");
        let access = tunnels[0]
            .access
            .for_one_connection()
            .expect("rules")
            .to_json();
        ["basic", "headers", "allow", "deny"]
            .map(|kind| access[kind].as_array().map_or(0, Vec::len))
    };
    assert_eq!(rules(&["start", "api"]), [0, 0, 1, 0]);
    assert_eq!(rules(&["start", "web"]), [1, 1, 0, 0]);
    assert_eq!(
        rules(&[
            "start",
            "web",
            "--basic-auth",
            "a:b",
            "--basic-auth",
            "c:d",
            "--deny",
            "::1,::2"
        ]),
        [2, 1, 0, 2]
    );
    let none = parse(&["-e", "wss://x.example.com"]).expect("settings");
    assert!(none[0].access.is_empty());

    for wrong in [
        &["--basic-auth", "swordfish"][..],
        &["--require-header", "swordfish"],
        &["--require-header", "host: swordfish"],
    ] {
        let Err(text) = parse(&[wrong, &["-e", "wss://x.example.com"]].concat()) else {
            panic!("accepted: {wrong:?}")
        };
        assert!(
            text.contains("basic_auth") || text.contains("require_header"),
            "{text}"
        );
        assert!(!text.contains("sword"), "{text}");
    }
}

#[test]
fn a_missing_endpoint_is_named() {
    let Err(text) = parse(&["http", "3000"]) else {
        panic!("settings without endpoint")
    };
    assert!(
        text.contains("--endpoint") && text.contains("TTF_ENDPOINT"),
        "{text}"
    );
}

#[test]
fn a_tunnels_table_accepts_every_key_of_the_top_level() {
    let file = file(
        "endpoint = 'wss://x.example.com'\ntoken = 'top'\ncompression = true\ntarget_insecure = true\n\
         [tunnels.api]\nendpoint = 'wss://y.example.com'\ntoken = 'own'\ncompression = false\n\
         target_insecure = false\n[tunnels.web]\n",
    );
    let path = file.path().to_str().expect("a path");
    let tunnels = parse(&["start", "--all", "--config", path]).expect("settings");
    let of = |settings: &Settings| {
        let token = settings
            .token
            .as_ref()
            .map(|token| token.reveal().to_owned());
        (
            settings.endpoint.to_string(),
            token.unwrap_or_default(),
            settings.compression,
            settings.target_tls.clone(),
        )
    };
    assert_eq!(
        of(&tunnels[0]),
        (
            "wss://y.example.com/".to_owned(),
            "own".to_owned(),
            false,
            AcceptedCertificates::System
        )
    );
    assert_eq!(
        of(&tunnels[1]),
        (
            "wss://x.example.com/".to_owned(),
            "top".to_owned(),
            true,
            AcceptedCertificates::Insecure
        )
    );
    let insecure = parse(&["start", "api", "--target-insecure", "--config", path]);
    assert_eq!(
        insecure.expect("settings")[0].target_tls,
        AcceptedCertificates::Insecure
    );
}

#[test]
fn tunnels_that_would_take_each_others_place_are_refused() {
    let file = file(
        "endpoint = 'wss://x.example.com'\n[tunnels.api]\ntunnel_id = 'one'\n\
         [tunnels.far]\nendpoint = 'wss://y.example.com'\ntunnel_id = 'one'\n\
         [tunnels.web]\ntunnel_id = 'one'\n",
    );
    let path = file.path().to_str().expect("a path");
    let start = |names: &[&str]| {
        parse(&[&["start", "--config", path], names].concat()).map(|tunnels| tunnels.len())
    };
    let twice = start(&["--all"]).expect_err("one tunnel id twice");
    assert!(
        twice.contains("api and web") && twice.contains("one"),
        "{twice}"
    );
    let named = start(&["web", "web"]).expect_err("one name twice");
    assert!(named.contains("web is named twice"), "{named}");
    assert_eq!(
        start(&["api", "far"]),
        Ok(2),
        "another service's ids are others"
    );
}

#[test]
fn a_log_level_that_is_a_typo_is_refused() {
    for good in [
        "warn",
        "WARN",
        "off",
        "warn,forwarder=debug",
        "hyper::proto=trace",
    ] {
        assert!(log_filter(good).is_ok(), "{good}");
    }
    for bad in [
        "loud",
        "",
        "warn,",
        "forwarder=loud",
        "forwarderr=debug",
        "info,debgu",
    ] {
        assert!(log_filter(bad).is_err(), "{bad}");
    }
}

//! Answers to words that are not ours: those of other tunnels' command lines, and mistyped ones.

use std::{ffi::OsString, path::Path};

use clap::{
    CommandFactory, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use tunnel_config::{closest, is_like_a_token, may_be_secret};

use crate::args::Cli;

/// Flags of other tunnels that have no counterpart of the same meaning here, and what there is instead.
const FLAGS: [(&[&str], &str); 23] = [
    (
        &[
            "--oauth",
            "--oauth-allow-domain",
            "--oauth-allow-email",
            "--oauth-client-id",
            "--oauth-client-secret",
            "--oauth-scope",
            "--oidc",
            "--saml",
            "--verify-webhook",
            "--mutual-tls-cas",
            "--webhook-verification",
        ],
        "is not supported; visitors can be held to passwords (--basic-auth), networks (--allow, --deny) and secret headers (--require-header)",
    ),
    (
        &["--region", "--edge-ip-version", "--region-name"],
        "is not needed: the endpoint decides where the service is",
    ),
    (
        &[
            "--protocol",
            "--proto",
            "--scheme",
            "--schemes",
            "--bind-tls",
            "--http2-origin",
            "--app-protocol",
        ],
        "is not needed: the public side decides between http and https, and the local service is spoken to in HTTP/1.1",
    ),
    (
        &[
            "--remote-port",
            "--remote-addr",
            "--local-port",
            "--local-ip",
            "--local-host",
            "--crt",
            "--key",
        ],
        "is not supported: tunnels carry HTTP and have names, not ports; see --tunnel-id and --target",
    ),
    (&["--request-header-remove"], "is --header=-NAME here"),
    (
        &["--response-header-remove"],
        "is --response-header=-NAME here",
    ),
    (
        &["--request-header-require"],
        "is --require-header \"NAME: VALUE\" here",
    ),
    (
        &["--hello-world", "--demo"],
        "is not supported; `ttf http DIRECTORY` serves files",
    ),
    (
        &[
            "--policy",
            "--traffic-policy-file",
            "--traffic-policy-url",
            "--policy-file",
            "--circuit-breaker",
            "--ua-filter-allow",
            "--ua-filter-deny",
            "--user-agent-filter-allow",
            "--user-agent-filter-deny",
        ],
        "is not supported; visitor rules are --basic-auth, --allow, --deny and --require-header",
    ),
    (
        &[
            "--websocket-tcp-converter",
            "--proxy-proto",
            "--terminate-at",
            "--upstream-protocol",
        ],
        "is not supported: tunnels carry HTTP requests and WebSockets as they are",
    ),
    (
        &[
            "--pooling-enabled",
            "--binding",
            "--internal",
            "--ha-connections",
            "--replicas",
        ],
        "is not supported: a tunnel has one agent, and the newest one of its owner serves it",
    ),
    (
        &[
            "--metadata",
            "--description",
            "--tag",
            "--label",
            "--labels",
        ],
        "is not supported: a tunnel has a name (--tunnel-id) and nothing else",
    ),
    (
        &[
            "--credentials-file",
            "--credentials-contents",
            "--origincert",
            "--cred-file",
            "--token-file",
            "--secret",
        ],
        "is not supported: `ttf login ENDPOINT` stores a token, and TTF_TOKEN passes one",
    ),
    (
        &[
            "--no-autoupdate",
            "--autoupdate-freq",
            "--update",
            "--update-channel",
        ],
        "is not needed: ttf never updates itself",
    ),
    (
        &[
            "--metrics",
            "--metrics-update-freq",
            "--management-diagnostics",
        ],
        "is not supported; the inspector shows rates and times, and `ttf status` says how a tunnel is",
    ),
    (
        &["--grace-period"],
        "is not needed: requests in progress have 10 seconds after Ctrl-C or SIGTERM",
    ),
    (
        &["--print-requests"],
        "is not needed: each request has a line on stderr",
    ),
    (
        &["--open", "-o", "--qr", "--qrcode"],
        "is not needed: on a terminal, the key o opens the URL in a browser and s shows it as a QR code",
    ),
    (
        &["--json"],
        "is not supported here: `--log-format json` makes the agent's lines JSON, and `ttf status` always prints JSON",
    ),
    (
        &["--host", "--server", "--server-addr"],
        "is --endpoint here, the address of the service",
    ),
    (
        &["--custom-domain", "--custom-domains", "--sd"],
        "is not supported: the service decides the domain of its tunnels, and --tunnel-id the first part",
    ),
    (
        &["--none"],
        "is not supported: an agent without tunnels has nothing to do",
    ),
    (
        &[
            "--pidfile",
            "--daemon",
            "--background",
            "--bg",
            "-d",
            "--detach",
        ],
        "is not supported; `ttf service install` keeps tunnels open in the background",
    ),
];

/// Commands of other tunnels, and what there is instead.
const COMMANDS: [(&[&str], &str); 15] = [
    (
        &[
            "tcp",
            "tls",
            "udp",
            "stcp",
            "sudp",
            "xtcp",
            "ssh",
            "smb",
            "rdp",
            "proxy-dns",
        ],
        "tunnels carry HTTP alone: `ttf http TARGET`",
    ),
    (
        &[
            "authtoken",
            "auth",
            "add-authtoken",
            "signin",
            "enable",
            "register",
            "init",
            "setup",
            "configure",
        ],
        "`ttf login ENDPOINT --token TOKEN` stores a token",
    ),
    (
        &[
            "tunnel", "local", "share", "expose", "serve", "funnel", "run", "open", "forward",
            "up", "https", "tcpmux", "client", "connect", "listen",
        ],
        "`ttf http TARGET` opens a tunnel, and `ttf start --all` those of the config file",
    ),
    (
        &["update", "upgrade", "self-update"],
        "ttf never updates itself: install a newer version in its place",
    ),
    (
        &["server", "proxy"],
        "the public side is another program: tunnel-local, or the functions on AWS",
    ),
    (
        &["list", "ls", "ps", "tunnels", "endpoints", "info"],
        "`ttf status ID` says how a tunnel is, and `tunnel-admin list-tunnels` lists those of a service",
    ),
    (
        &[
            "stop", "down", "delete", "disable", "cleanup", "restart", "kill", "quit", "exit",
        ],
        "a tunnel ends with its agent (Ctrl-C, or `ttf service stop`), and `ttf release ID` gives up its name",
    ),
    (
        &["create", "route", "reserve"],
        "the first use of a name claims it: `ttf http TARGET --tunnel-id NAME`",
    ),
    (
        &["logs", "tail", "inspect", "requests"],
        "each request has a line on stderr (--log FILE for a file), and the inspector is at http://127.0.0.1:4040 while a tunnel is open",
    ),
    (
        &["install", "uninstall", "daemon"],
        "`ttf service install` keeps tunnels open in the background",
    ),
    (
        &[
            "doctor", "diag", "check", "test", "ping", "netcheck", "whoami",
        ],
        "`ttf diagnose` tries the endpoint and the token that are stored, and the way to them",
    ),
    (
        &["access"],
        "visitors can be held to passwords (--basic-auth), networks (--allow, --deny) and secret headers (--require-header)",
    ),
    (
        &["token"],
        "`tunnel-admin create-token NAME` makes one on the service's side, and `ttf login ENDPOINT --token TOKEN` stores it",
    ),
    (
        &["api", "credits", "dashboard", "web"],
        "there is no account to manage: the service is yours",
    ),
    (
        &["reload", "verify", "validate", "ingress"],
        "`ttf config check` checks the config files; the agent reads them when it starts",
    ),
];

/// Reads a command line. `ttf 3000` is `ttf http 3000`.
///
/// # Errors
/// If there is something that it cannot have; the text says what there is instead.
pub(crate) fn read(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    // Alone, it prints the version of ngrok and cloudflared, too.
    if let [program, flag] = arguments
        && flag == "-v"
    {
        return Cli::try_parse_from([program.clone(), "-V".into()]);
    }
    let arguments = &with_two_dashes(arguments);
    let answer = |error| answer(error, arguments);
    let cli = Cli::try_parse_from(arguments).map_err(answer)?;
    let Some(words) = cli.unknown_command() else {
        return Ok(cli);
    };
    let word = words.first().map(OsString::as_os_str).unwrap_or_default();
    if is_like_a_target(&word.to_string_lossy()) {
        let mut arguments = arguments.to_vec();
        arguments.insert(arguments.len() - words.len(), "http".into());
        return Cli::try_parse_from(arguments).map_err(answer);
    }
    Err(Cli::command().error(ErrorKind::InvalidSubcommand, about_command(words)))
}

/// `-subdomain=x` is `--subdomain=x`: programs written in Go, such as ngrok 2, take one dash for two.
fn with_two_dashes(arguments: &[OsString]) -> Vec<OsString> {
    let mut command = Cli::command();
    command.build();
    let commands = std::iter::once(&command).chain(command.get_subcommands());
    let flags: Vec<&clap::Arg> = commands.flat_map(clap::Command::get_arguments).collect();
    let ours = |name: &str| {
        flags.iter().find(|flag| {
            flag.get_long() == Some(name)
                || flag
                    .get_all_aliases()
                    .is_some_and(|aliases| aliases.contains(&name))
        })
    };
    let is_flag = |name: &str| {
        ours(name).is_some()
            || FLAGS.iter().any(|(flags, _)| {
                flags
                    .iter()
                    .any(|flag| flag.strip_prefix("--") == Some(name))
            })
    };
    let with_two = |argument: &OsString| {
        let word = argument.to_str()?.strip_prefix('-')?;
        let name = word.split('=').next()?;
        is_flag(name).then(|| OsString::from(format!("--{word}")))
    };
    // The rule of `--header -name` is no flag, whatever it is called.
    let takes_next = |argument: &OsString| {
        let name = argument.to_str().and_then(|word| word.strip_prefix("--"));
        name.and_then(ours)
            .is_some_and(|flag| flag.get_action().takes_values() && !flag.is_require_equals_set())
    };
    let mut is_value = false;
    arguments
        .iter()
        .map(|argument| {
            let read = match with_two(argument) {
                Some(flag) if !is_value => flag,
                _ => argument.clone(),
            };
            is_value = !is_value && takes_next(&read);
            read
        })
        .collect()
}

/// Not a command, but an address or a directory: `3000`, `localhost:3000`, `./dist`.
fn is_like_a_target(word: &str) -> bool {
    word == "localhost"
        || word.contains(['.', ':', '/', '\\'])
        || word.bytes().all(|byte| byte.is_ascii_digit())
        || Path::new(word).is_dir()
}

fn about_command(words: &[OsString]) -> String {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let word = words.first().map_or("", AsRef::as_ref);
    let elsewhere = |word: &str| COMMANDS.iter().find(|(words, _)| words.contains(&word));
    let command = Cli::command();
    let is_ours = |word: &str| {
        command
            .get_subcommands()
            .any(|ours| ours.get_name() == word)
    };
    // With cloudflared, most commands come after this one.
    if word == "tunnel"
        && let Some(next) = words[1..].iter().find(|word| !word.starts_with('-'))
    {
        if is_ours(next) {
            return format!("there is no command 'tunnel': it is `ttf {next}` here");
        }
        if let Some((_, answer)) = elsewhere(next) {
            return format!("there is no command 'tunnel {next}': {answer}");
        }
    }
    if let Some((_, answer)) = elsewhere(word) {
        return format!("there is no command '{word}': {answer}");
    }
    let known = command.get_subcommands().map(clap::Command::get_name);
    match closest(word, known) {
        Some(meant) => format!("there is no command '{word}'; did you mean '{meant}'?"),
        None => format!("there is no command '{word}'; to open a tunnel: ttf http 3000"),
    }
}

/// Says what there is instead of what a command line has, and takes back what clap suggests wrongly.
fn answer(mut error: clap::Error, arguments: &[OsString]) -> clap::Error {
    let text = |error: &clap::Error, kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(flag) = text(&error, ContextKind::InvalidArg)
    {
        // frp has underscores.
        let name = flag.replace('_', "-");
        let elsewhere = FLAGS.iter().find(|(flags, _)| flags.contains(&&*name));
        let message = match elsewhere {
            Some((_, answer)) => Some(format!("'{flag}' {answer}")),
            None if flag.starts_with('-') => None,
            None => about_word_too_many(arguments),
        };
        if let Some(message) = message {
            return Cli::command().error(ErrorKind::UnknownArgument, message);
        }
        // "to pass '--x' as a value, use '-- --x'": no value of ours begins with a dash.
        error.remove(ContextKind::Suggested);
    }
    if error.kind() == ErrorKind::InvalidSubcommand
        && let Some(word) = text(&error, ContextKind::InvalidSubcommand)
    {
        let word = if is_like_a_token(&word) {
            "(not shown)".to_owned()
        } else {
            word
        };
        let message = if arguments.iter().any(|argument| argument == "service") {
            format!(
                "there is no `ttf service {word}`; there are install (which starts it again with changed files), uninstall, start, stop and status"
            )
        } else {
            about_command(&[word.into()])
        };
        return Cli::command().error(ErrorKind::InvalidSubcommand, message);
    }
    // An address with a password in it, or a token in place of one, must not end up in a log.
    if text(&error, ContextKind::InvalidValue).is_some_and(|value| may_be_secret(&value)) {
        let hidden = ContextValue::String("(not shown)".to_owned());
        error.insert(ContextKind::InvalidValue, hidden);
    }
    error
}

/// What to say of a second word where a command takes one. It is not repeated, as it may be a token.
fn about_word_too_many(arguments: &[OsString]) -> Option<String> {
    let command = arguments
        .iter()
        .skip(1)
        .find(|argument| !argument.to_string_lossy().starts_with('-'))?;
    let answer = match command.to_str()? {
        word if word == "http" || is_like_a_target(word) => {
            "`ttf http` takes one target: several tunnels stand in the config file, for `ttf start`"
        }
        "login" => "`ttf login` takes one word, the endpoint: `ttf login ENDPOINT --token TOKEN`",
        "service" => {
            "`ttf service` takes no token: it uses the one that `ttf login ENDPOINT --token TOKEN` stores"
        }
        _ => return None,
    };
    Some(answer.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: &str) -> String {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        match read(&arguments) {
            Ok(cli) => panic!("{line}: {cli:?}"),
            Err(error) => error.to_string(),
        }
    }

    fn is_read(line: &str) -> bool {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        read(&arguments).is_ok()
    }

    #[test]
    fn a_target_needs_no_command() {
        for line in [
            "ttf 3000",
            "ttf :3000",
            "ttf localhost:3000",
            "ttf localhost",
            "ttf https://localhost:8443 -s my-app",
            "ttf -e 127.0.0.1:8080 3000 --subdomain my-app",
            "ttf unix:/run/app.sock",
        ] {
            assert!(is_read(line), "{line}");
        }
        assert!(refusal("ttf 70000").contains("1 to 65535"));
    }

    #[test]
    fn the_rule_of_a_header_is_no_flag() {
        for name in ["server", "host", "json", "q"] {
            let line = format!("ttf http 3000 --response-header -{name} -subdomain=my-app");
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let read = with_two_dashes(&arguments);
            assert_eq!(read[4].to_string_lossy(), format!("-{name}"));
            assert_eq!(read[5], "--subdomain=my-app");
        }
    }

    #[test]
    fn words_of_other_tunnels_are_taken() {
        for line in [
            "ttf http 3000 --authtoken abc",
            "ttf http --url http://localhost:3000",
            "ttf http 3000 --domain my-app",
            "ttf http 3000 --hostname my-app",
            "ttf http 3000 --cidr-allow ::1 --cidr-deny ::2",
            "ttf http 3000 --host-header=rewrite",
            "ttf http 3000 --basic-auth u:p --auth u:p",
            "ttf http 3000 --no-tls-verify",
            "ttf http --port 3000 --to 127.0.0.1:8080",
            "ttf start --all --config a.toml --config b.toml",
            "ttf http 3000 --log-format logfmt --log stdout",
            "ttf http 3000 --log-format term",
            "ttf http 3000 --output json",
            "ttf http -subdomain=my-app 3000",
            "ttf http -authtoken abc -host-header=rewrite 3000",
            "ttf -e127.0.0.1:8080 3000",
        ] {
            assert!(is_read(line), "{line}: {}", refusal(line));
        }
    }

    #[test]
    fn words_that_do_not_exist_are_answered_with_what_there_is() {
        for (line, words) in [
            ("ttf http 3000 --oauth google", "--basic-auth"),
            ("ttf http 3000 --region eu", "the endpoint decides"),
            ("ttf http -region=eu 3000", "the endpoint decides"),
            ("ttf http 3000 --scheme=https", "not needed"),
            ("ttf http 3000 --metrics :9000", "ttf status"),
            ("ttf tcp 22", "HTTP alone"),
            ("ttf authtoken abc", "ttf login"),
            ("ttf tunnel --url http://localhost:3000", "ttf http TARGET"),
            ("ttf share", "ttf http TARGET"),
            ("ttf update", "never updates itself"),
            ("ttf tunnel login", "`ttf login` here"),
            ("ttf tunnel list", "tunnel-admin list-tunnels"),
            ("ttf tunnel delete x", "ttf release ID"),
            ("ttf tunnel create x", "--tunnel-id NAME"),
            ("ttf tunnel --config x.yml run", "ttf http TARGET"),
            ("ttf logs", "http://127.0.0.1:4040"),
            ("ttf doctor", "ttf diagnose"),
            ("ttf setup", "ttf login"),
            ("ttf help tcp", "HTTP alone"),
            ("ttf service restart", "stop and status"),
            ("ttf service install abc", "ttf login ENDPOINT"),
            ("ttf login token abc", "--token TOKEN"),
            ("ttf http 3000 4000", "ttf start"),
            ("ttf 3000 4000", "ttf start"),
            ("ttf http --local_port 3000", "--target"),
            ("ttf --host https://localtunnel.me 3000", "--endpoint"),
            ("ttf start --none", "nothing to do"),
            ("ttf status --json", "always prints JSON"),
            ("ttf strat --all", "did you mean 'start'?"),
            ("ttf xyzzy", "ttf http 3000"),
            ("ttf -v", env!("CARGO_PKG_VERSION")),
        ] {
            let said = refusal(line);
            assert!(said.contains(words), "{line}: {said}");
        }
        let said = refusal("ttf login ttf_0123456789abcdef");
        assert!(
            said.contains("looks like a token") && !said.contains("0123"),
            "{said}"
        );
        let said = refusal("ttf http 3000 --tunel-id x");
        assert!(said.contains("--tunnel-id"), "{said}");
        let said = refusal("ttf http 3000 --xyzzy");
        assert!(!said.contains("as a value"), "{said}");
    }
}

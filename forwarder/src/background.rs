//! `ttf service`: the tunnels of the config file, kept open by the system's service manager.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use service_manager::{
    RestartPolicy, ServiceInstallCtx, ServiceLabel, ServiceLevel, ServiceManager,
    ServiceManagerKind, ServiceStartCtx, ServiceStatus, ServiceStatusCtx, ServiceStopCtx,
    ServiceUninstallCtx,
};

/// The unit of the whole machine, as packages install it: hardened, with a user of its own.
const SYSTEM_UNIT: &str = include_str!("../../packaging/systemd/ttf.service");
/// What the service is called, unless it is named.
const NAME: &str = "ttf";
/// The pause before a start that follows a failure, in seconds.
const RESTART_DELAY_SECONDS: u32 = 5;

/// What is to be done with the service.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Subcommand)]
pub(crate) enum BackgroundCommand {
    /// Install the service, which runs `ttf start --all`, and start it
    Install,
    /// Stop the service and remove it
    Uninstall,
    /// Start the service
    Start,
    /// Stop the service; it starts again with the system
    Stop,
    /// Print whether the service runs
    Status,
}

/// Which service of the system.
#[derive(Args, Clone, Debug)]
pub(crate) struct BackgroundOptions {
    /// Run for the whole machine and without anyone logged in; needs root
    #[arg(long, global = true)]
    pub system: bool,
    /// What the service is called, for several on one machine
    #[arg(long, global = true, value_name = "NAME", default_value = NAME)]
    pub service_name: String,
}

/// `ttf service`, with what it needs.
#[derive(Debug)]
pub(crate) struct Background {
    /// What is to be done.
    pub command: BackgroundCommand,
    /// Which service.
    pub options: BackgroundOptions,
    /// The config files of the command line.
    pub files: Vec<PathBuf>,
    /// Only the flags or the environment of this process name the proxy that leads to the service of a tunnel.
    pub loses_proxy: bool,
    /// The one in its default place, if there is one. A user's service finds it there, but that of the machine is no user.
    pub default_file: Option<PathBuf>,
}

/// Why the service manager does not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackgroundError {
    /// There is none that is known.
    #[error(
        "no service manager is found here (systemd, launchd, OpenRC, rc.d, Windows services): {0}"
    )]
    NoManager(io::Error),
    /// It has refused.
    #[error("the service manager refused: {}", one_line(.0))]
    Refused(io::Error),
    /// There is none of this name.
    #[error("the service {0} is not installed: `ttf service install`")]
    NotInstalled(String),
    /// What is to be run is not known.
    #[error("cannot find this executable or its files: {0}")]
    Executable(io::Error),
    /// A service without tunnels would end at once.
    #[error(
        "the config files have no [tunnels.NAME], which the service would open: write one with `ttf config edit`, such as [tunnels.web] with target = 3000 below it"
    )]
    NoTunnels,
}

impl Background {
    /// Does it, and returns what to tell the user.
    ///
    /// # Errors
    /// If the service manager does not.
    pub(crate) fn run(&self) -> Result<String, BackgroundError> {
        let name = &self.options.service_name;
        let mut manager = <dyn ServiceManager>::native().map_err(BackgroundError::NoManager)?;
        let level = if self.options.system {
            ServiceLevel::System
        } else {
            ServiceLevel::User
        };
        manager.set_level(level).map_err(BackgroundError::Refused)?;
        let label: ServiceLabel = name.parse().map_err(BackgroundError::Refused)?;
        let is_missing = || {
            let label = label.clone();
            let status = manager.status(ServiceStatusCtx { label });
            matches!(status, Ok(ServiceStatus::NotInstalled))
        };
        let needs_one = matches!(
            self.command,
            BackgroundCommand::Start | BackgroundCommand::Stop | BackgroundCommand::Uninstall
        );
        if needs_one && is_missing() {
            return Err(BackgroundError::NotInstalled(name.clone()));
        }
        let done = match self.command {
            BackgroundCommand::Install => return self.install(manager.as_ref(), label),
            BackgroundCommand::Uninstall => {
                // One that does not run cannot be stopped.
                let _ = manager.stop(ServiceStopCtx {
                    label: label.clone(),
                });
                manager.uninstall(ServiceUninstallCtx { label })
            }
            BackgroundCommand::Start => manager.start(ServiceStartCtx { label }),
            BackgroundCommand::Stop => manager.stop(ServiceStopCtx { label }),
            BackgroundCommand::Status => {
                let status = manager.status(ServiceStatusCtx { label });
                return status
                    .map(|status| said(name, &status))
                    .map_err(BackgroundError::Refused);
            }
        };
        done.map_err(BackgroundError::Refused)?;
        Ok(match self.command {
            BackgroundCommand::Uninstall => format!("the service {name} is removed"),
            BackgroundCommand::Start => format!("the service {name} is started"),
            _ => format!("the service {name} is stopped"),
        })
    }

    fn install(
        &self,
        manager: &dyn ServiceManager,
        label: ServiceLabel,
    ) -> Result<String, BackgroundError> {
        let program = std::env::current_exe().map_err(BackgroundError::Executable)?;
        let files = self.files().map_err(BackgroundError::Executable)?;
        let is_systemd = matches!(
            ServiceManagerKind::native(),
            Ok(ServiceManagerKind::Systemd)
        );
        let unit = if self.options.system {
            system_unit(&program, &files)
        } else {
            user_unit(&program, &files)
        };
        let context = ServiceInstallCtx {
            label: label.clone(),
            contents: is_systemd.then_some(unit),
            program,
            args: arguments(&files),
            username: None,
            working_directory: None,
            environment: None,
            autostart: true,
            restart_policy: RestartPolicy::OnFailure {
                delay_secs: Some(RESTART_DELAY_SECONDS),
                max_retries: None,
                reset_after_secs: None,
            },
        };
        // One that is there already starts again, with these files. Most often there is none to stop.
        let _ = manager.stop(ServiceStopCtx {
            label: label.clone(),
        });
        manager.install(context).map_err(BackgroundError::Refused)?;
        manager
            .start(ServiceStartCtx { label })
            .map_err(BackgroundError::Refused)?;
        let mut said = format!(
            "the service {} is installed and started",
            self.options.service_name
        );
        if is_systemd && !self.options.system {
            said.push_str(
                "; it ends when you log out, unless you run `loginctl enable-linger` once",
            );
        }
        if self.loses_proxy {
            said.push_str(
                "; it does not see the proxy that this shell names (--proxy, TTF_PROXY, HTTPS_PROXY or ALL_PROXY): write proxy = \"URL\" into the config file and install it again",
            );
        }
        Ok(said)
    }

    /// The config files that the service has to be told about.
    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let default_file = self.default_file.iter().filter(|_| self.options.system);
        default_file
            .chain(&self.files)
            .map(std::path::absolute)
            .collect()
    }
}

/// What a service manager's program has written, which may be several lines.
fn one_line(error: &io::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let said = lines.join("; ");
    if said.contains("Failed to connect to bus") {
        return format!(
            "{said}; this shell is not in a session of systemd: log in as the user (`machinectl shell USER@`), or use --system"
        );
    }
    said
}

fn said(name: &str, status: &ServiceStatus) -> String {
    match status {
        ServiceStatus::NotInstalled => format!("the service {name} is not installed"),
        ServiceStatus::Running => format!("the service {name} runs"),
        ServiceStatus::Stopped(None) => format!("the service {name} is stopped"),
        ServiceStatus::Stopped(Some(reason)) => format!("the service {name} is stopped: {reason}"),
    }
}

/// What the service runs.
fn arguments(files: &[PathBuf]) -> Vec<OsString> {
    let files = files
        .iter()
        .flat_map(|file| ["--config".into(), file.clone().into_os_string()]);
    ["start", "--all", "--keep-trying"]
        .map(OsString::from)
        .into_iter()
        .chain(files)
        .collect()
}

/// [`SYSTEM_UNIT`] for this executable, with these files as credentials.
fn system_unit(program: &Path, files: &[PathBuf]) -> String {
    let start = command(program, &arguments(&[]));
    let names: Vec<String> = (1..=files.len()).map(|n| format!("{n}.toml")).collect();
    let options: String = names
        .iter()
        .map(|name| format!(" --config ${{CREDENTIALS_DIRECTORY}}/{name}"))
        .collect();
    let credentials: Vec<String> = names
        .iter()
        .zip(files)
        .map(|(name, file)| {
            // This setting is not made of words, so nothing else is special in it.
            let file = file.to_string_lossy().replace('%', "%%");
            format!("LoadCredential={name}:{file}")
        })
        .collect();
    let lines: Vec<String> = SYSTEM_UNIT
        .lines()
        .map(|line| match line.split_once('=') {
            Some(("ExecStart", _)) => format!("ExecStart={start}{options}"),
            Some(("LoadCredential", _)) => credentials.join("\n"),
            _ => line.to_owned(),
        })
        .collect();
    lines.join("\n") + "\n"
}

/// A unit of a user, which has less to restrict and no other user to become.
fn user_unit(program: &Path, files: &[PathBuf]) -> String {
    let command = command(program, &arguments(files));
    format!(
        "[Unit]\n\
         Description=HTTP tunnels to services on this machine\n\
         \n\
         [Service]\n\
         Type=notify\n\
         ExecStart={command}\n\
         Restart=on-failure\n\
         RestartSec={RESTART_DELAY_SECONDS}\n\
         # Wrong usage, a refused token, a tunnel id that is taken, another agent in its place: trying again does not help.\n\
         RestartPreventExitStatus=2 3 4 5 6\n\
         WatchdogSec=60\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n"
    )
}

/// A unit's command line.
fn command(program: &Path, arguments: &[OsString]) -> String {
    let words: Vec<String> = [program.as_os_str()]
        .into_iter()
        .chain(arguments.iter().map(OsString::as_os_str))
        .map(|word| quoted(&word.to_string_lossy()))
        .collect();
    words.join(" ")
}

/// A word in a unit's setting (systemd.service(5), systemd.syntax(7)).
fn quoted(word: &str) -> String {
    let escaped = word
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%")
        .replace('$', "$$");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_manager_says_is_one_line() {
        let refused = |text: &str| BackgroundError::Refused(io::Error::other(text)).to_string();
        assert_eq!(
            refused("Failed to start x.service: Unit not found.\n"),
            "the service manager refused: Failed to start x.service: Unit not found."
        );
        let no_session = refused("Failed to connect to bus: No medium found\n");
        assert!(no_session.contains("--system"), "{no_session}");
    }

    #[test]
    fn a_users_unit_runs_every_tunnel_of_the_files() {
        let unit = user_unit(
            Path::new("/usr/bin/ttf"),
            &["/home/a b/100%/ttf.toml".into()],
        );
        assert!(
            unit.contains("\nExecStart=\"/usr/bin/ttf\" \"start\" \"--all\" \"--keep-trying\" \"--config\" \"/home/a b/100%%/ttf.toml\"\n"),
            "{unit}"
        );
        assert!(unit.ends_with("WantedBy=default.target\n"), "{unit}");
    }

    #[test]
    fn the_machines_unit_is_that_of_the_packages_with_other_files() {
        let unit = system_unit(
            Path::new("/opt/my apps/ttf"),
            &["/etc/a.toml".into(), "/root/100%/b.toml".into()],
        );
        let changed: Vec<&str> = unit
            .lines()
            .filter(|line| !SYSTEM_UNIT.lines().any(|same| same == *line))
            .collect();
        assert_eq!(
            changed,
            [
                "ExecStart=\"/opt/my apps/ttf\" \"start\" \"--all\" \"--keep-trying\" --config ${CREDENTIALS_DIRECTORY}/1.toml --config ${CREDENTIALS_DIRECTORY}/2.toml",
                "LoadCredential=1.toml:/etc/a.toml",
                "LoadCredential=2.toml:/root/100%%/b.toml",
            ]
        );
        assert_eq!(unit.lines().count(), SYSTEM_UNIT.lines().count() + 1);
    }
}

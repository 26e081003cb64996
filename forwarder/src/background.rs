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
    /// The config files that the service reads beside the one in its default place.
    pub files: Vec<PathBuf>,
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
    #[error("the service manager refused: {0}")]
    Refused(io::Error),
    /// What is to be run is not known.
    #[error("cannot find this executable or its files: {0}")]
    Executable(io::Error),
    /// A service without tunnels would end at once.
    #[error(
        "the config files have no [tunnels.NAME], which the service would open: `ttf config edit`"
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
        let files = self
            .files
            .iter()
            .map(std::path::absolute)
            .collect::<Result<Vec<_>, _>>();
        let args = arguments(&files.map_err(BackgroundError::Executable)?);
        let is_systemd = matches!(
            ServiceManagerKind::native(),
            Ok(ServiceManagerKind::Systemd)
        );
        let context = ServiceInstallCtx {
            label: label.clone(),
            contents: is_systemd.then(|| unit(&program, &args, self.options.system)),
            program,
            args,
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
        manager.install(context).map_err(BackgroundError::Refused)?;
        manager
            .start(ServiceStartCtx { label })
            .map_err(BackgroundError::Refused)?;
        let name = &self.options.service_name;
        Ok(if is_systemd && !self.options.system {
            format!(
                "the service {name} is installed and started; it ends when you log out, unless you run `loginctl enable-linger` once"
            )
        } else {
            format!("the service {name} is installed and started")
        })
    }
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

/// A systemd unit.
fn unit(program: &Path, arguments: &[OsString], is_system: bool) -> String {
    let words: Vec<String> = [program.as_os_str()]
        .into_iter()
        .chain(arguments.iter().map(OsString::as_os_str))
        .map(|word| quoted(&word.to_string_lossy()))
        .collect();
    let wanted_by = if is_system {
        "multi-user.target"
    } else {
        "default.target"
    };
    let command = words.join(" ");
    format!(
        "[Unit]\n\
         Description=Tunnels to services on this machine\n\
         Wants=network-online.target\n\
         After=network-online.target\n\
         \n\
         [Service]\n\
         ExecStart={command}\n\
         Restart=on-failure\n\
         RestartSec={RESTART_DELAY_SECONDS}\n\
         # Wrong usage, a refused token, a tunnel id that is taken, another agent in its place: trying again does not help.\n\
         RestartPreventExitStatus=2 3 4 5 6\n\
         \n\
         [Install]\n\
         WantedBy={wanted_by}\n"
    )
}

/// A word of a unit's command line (systemd.service(5), systemd.syntax(7)).
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
    fn a_unit_runs_every_tunnel_of_the_files() {
        let files = ["/home/a b/100%/ttf.toml".into()];
        let unit = unit(Path::new("/usr/bin/ttf"), &arguments(&files), false);
        assert!(
            unit.contains("\nExecStart=\"/usr/bin/ttf\" \"start\" \"--all\" \"--keep-trying\" \"--config\" \"/home/a b/100%%/ttf.toml\"\n"),
            "{unit}"
        );
        assert!(unit.ends_with("WantedBy=default.target\n"), "{unit}");
    }
}

//! What an executable writes about itself for shells and for man(1).

use std::{io::Write, path::PathBuf};

use clap::{Command, Subcommand};
use clap_complete::Shell;

/// A document.
#[derive(Debug, Subcommand)]
pub(crate) enum Document {
    /// Print a script that completes commands and flags
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write one for each command
    Man {
        /// Write the pages into this directory
        #[arg(long, value_name = "DIRECTORY")]
        directory: Option<PathBuf>,
    },
}

impl Document {
    /// Writes the document about an executable with this command line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(crate) fn write(&self, mut command: Command) -> std::io::Result<()> {
        let mut document = Vec::new();
        match self {
            Self::Completions { shell } => {
                let name = command.get_name().to_owned();
                clap_complete::generate(*shell, &mut command, name, &mut document);
            }
            Self::Man { directory: None } => {
                clap_mangen::Man::new(command).render(&mut document)?;
            }
            Self::Man {
                directory: Some(directory),
            } => {
                std::fs::create_dir_all(directory)?;
                clap_mangen::generate_to(command, directory)?;
            }
        }
        // A reader who has seen enough, such as `head`, is no failure.
        let _ = std::io::stdout().write_all(&document);
        Ok(())
    }
}

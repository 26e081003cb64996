//! The manual pages: ttf(1) in the order in which it is read, and a page for each command as clap knows it.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use clap::Command;
use clap_mangen::Man;

const SYNOPSIS: &str = "\
.SH SYNOPSIS
.nf
\\fBttf\\fR [\\fIOPTIONS\\fR] \\fITARGET\\fR
\\fBttf\\fR [\\fIOPTIONS\\fR] \\fICOMMAND\\fR ...
.fi
.SH DESCRIPTION
\\fBttf\\fR keeps tunnels open and passes visitors' requests on to local HTTP services. A \\fITARGET\\fR is a port (3000), host:port,
http(s)://host:port, unix:/path, or a directory whose files are served; \\fBttf 3000\\fR is short for \\fBttf http 3000\\fR.
.PP
The public URL is printed on stdout, one line for each tunnel; everything else goes to stderr. On a terminal both show a console
instead.
";

const AFTER_OPTIONS: &str = "\
.SH ENVIRONMENT
.TP
\\fBTTF_ENDPOINT\\fR, \\fBTTF_TOKEN\\fR, \\fBTTF_LOG_LEVEL\\fR, ...
Every option but \\fB\\-v\\fR has a variable: its name in capitals, with _ in place of \\-. Options override variables, and variables
the config files.
.TP
\\fBHTTPS_PROXY\\fR, \\fBALL_PROXY\\fR, \\fBNO_PROXY\\fR
The proxy to the service, unless \\fB\\-\\-proxy\\fR names one.
.TP
\\fBVISUAL\\fR, \\fBEDITOR\\fR
The editor of \\fBttf config edit\\fR.
.TP
\\fBNO_COLOR\\fR
If set, the console has no colours.
.SH FILES
.TP
\\fI~/.config/ttf/config.toml\\fR
The config file, which \\fBttf login\\fR makes. Its keys are the options, with _ in place of \\-; tables [tunnels.NAME] are for
\\fBttf start\\fR. \\fBttf config path\\fR prints where it is on this system.
.TP
\\fI~/.config/ttf/tunnels.toml\\fR
The random tunnel ids that are requested again at the next start.
.SH \"EXIT STATUS\"
.TP
0
Stopped on request.
.TP
1
Failed.
.TP
2
Wrong usage or config.
.TP
3
The service refused the token.
.TP
4
The tunnel id belongs to another owner.
.TP
5
Another agent of the same owner serves the tunnel, or the tunnel id was released.
.TP
6
The service is too old to enforce the visitor rules.
.SH EXAMPLES
.TP
ttf login https://tunnel.example.com
Stores the service and asks for its token.
.TP
ttf 3000 \\-\\-tunnel\\-id my\\-app
Gives the service at port 3000 of this machine a public URL that stays.
.TP
ttf ./dist \\-\\-spa
Shows a build of a single-page application.
.TP
ttf http https://localhost:8443 \\-\\-target\\-insecure \\-\\-basic\\-auth alice:secret
Passes on to a service with a certificate of its own, and asks visitors for a password.
.TP
ttf service install
Keeps the tunnels of the config file open in the background.
";

/// Writes the page ttf(1) of a command line.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn page(command: Command, page: &mut impl Write) -> io::Result<()> {
    let man = Man::new(command);
    man.render_title(page)?;
    man.render_name_section(page)?;
    page.write_all(SYNOPSIS.as_bytes())?;
    man.render_subcommands_section(page)?;
    man.render_options_section(page)?;
    page.write_all(AFTER_OPTIONS.as_bytes())
}

/// Writes the pages of all commands into a directory.
///
/// # Errors
/// If that is impossible.
pub(crate) fn pages(command: Command, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(command.clone(), directory)?;
    page(command, &mut fs::File::create(directory.join("ttf.1"))?)
}

//! The `status` commands of both daemons.

use std::io::{self, Write as _};

use clap::Args;

use crate::control::status::Status;
use crate::control::trust::ControlArgs;
use crate::control::{status, ControlError};
use crate::text::{escaped_but, escaped_json};

/// What they take.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub daemon: ControlArgs,
}

impl StatusArgs {
    /// Asks a daemon and prints what it says. `socket`: its name in the current directory. Gives the exit code.
    pub fn show<E>(&self, socket: &str) -> Result<u8, E>
    where
        E: From<ControlError> + From<serde_json::Error> + From<io::Error>,
    {
        self.print(&status(&self.daemon.socket(socket))?)
    }

    /// Prints what a daemon says. Gives the exit code.
    pub fn print<E>(&self, status: &Status) -> Result<u8, E>
    where
        E: From<serde_json::Error> + From<io::Error>,
    {
        let text = match self.json {
            true => escaped_json(&serde_json::to_string_pretty(status)?).into_owned() + "\n",
            false => escaped_but(&status.to_text(), |c| c == '\n').into_owned(),
        };
        match io::stdout().write_all(text.as_bytes()) {
            // Its reader has what it wants (`| head`).
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
            written => Ok(written.map(|()| 0)?),
        }
    }
}

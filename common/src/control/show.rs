//! The `status` commands of both daemons.

use std::io::{self, Write as _};

use crate::control::trust::ControlSocket;
use crate::control::{status, ControlError};
use crate::text::{escaped_but, escaped_json};

/// Asks a daemon and prints what it says: the `status` commands. Gives the exit code.
pub fn show<E>(control: &ControlSocket, json: bool) -> Result<u8, E>
where
    E: From<ControlError> + From<serde_json::Error> + From<io::Error>,
{
    let status = status(control)?;
    let text = match json {
        true => escaped_json(&serde_json::to_string_pretty(&status)?).into_owned() + "\n",
        false => escaped_but(&status.to_text(), |c| c == '\n').into_owned(),
    };
    match io::stdout().write_all(text.as_bytes()) {
        // Its reader has what it wants (`| head`).
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        written => Ok(written.map(|()| 0)?),
    }
}

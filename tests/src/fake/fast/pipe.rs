//! Pages into pipes as CRIU gives them.

use std::os::fd::AsFd;

use anyhow::{ensure, Context, Result};
use rustix::io::Errno;
use rustix::pipe::{vmsplice, IoSliceRaw, SpliceFlags};

/// Moves `memory` into a pipe by reference, with the flag that CRIU's page pipes use.
///
/// The pages are the pipe's (and then the socket's) until its reader has taken them: callers
/// change `memory` only after the receiver has acknowledged all of it.
pub fn vmsplice_all(pipe: impl AsFd, mut memory: &[u8]) -> Result<()> {
    while !memory.is_empty() {
        // SAFETY: the slice is valid readable memory for the length of the call. Afterwards the
        // pipe holds references to its pages (not to the mapping), which the kernel only reads.
        let moved =
            unsafe { vmsplice(&pipe, &[IoSliceRaw::from_slice(memory)], SpliceFlags::GIFT) };
        match moved {
            Ok(n) => {
                ensure!(n > 0, "vmsplice moved nothing");
                memory = &memory[n..];
            }
            Err(Errno::INTR) => (),
            Err(e) => return Err(e).context("vmsplice into an image's pipe"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn more_than_a_pipe_holds_arrives_whole() {
        let memory: Vec<u8> = (0..1_000_003u32)
            .map(|n| n.to_le_bytes()[n as usize % 3])
            .collect();
        let (r, w) = crate::fake::wire::pipe().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::fs::File::from(r).read_to_end(&mut all).unwrap();
            all
        });
        vmsplice_all(&w, &memory).unwrap();
        drop(w);
        assert!(reader.join().unwrap() == memory);
    }
}

//! The fuzzer's bytes, read from the front. Where they end zeros follow, so every input is a whole
//! script, and seeds can be written by hand.

use arbitrary::{Arbitrary, Unstructured};

pub struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A number or a bool.
    pub fn any<T: Arbitrary<'a> + Default>(&mut self) -> T {
        self.0.arbitrary().unwrap_or_default()
    }

    pub fn u8(&mut self) -> u8 {
        self.any()
    }

    /// Below `n`, which is at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n
    }

    pub fn pick<'b, T>(&mut self, from: &'b [T]) -> &'b T {
        &from[self.below(from.len())]
    }

    /// At most `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let n = n.min(self.0.len());
        self.0.bytes(n).unwrap_or_default()
    }

    /// Bytes with their length, of one byte, before them.
    pub fn short(&mut self) -> &'a [u8] {
        let n = self.u8();
        self.bytes(n.into())
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    /// The right number, mostly; or a little off, or any.
    pub fn about(&mut self, right: u64) -> u64 {
        match self.u8() {
            0..=223 => right,
            224..=239 => right.wrapping_add(1),
            240..=247 => right.wrapping_sub(1),
            _ => self.any(),
        }
    }
}

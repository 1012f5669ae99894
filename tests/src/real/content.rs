//! What the test programs compute (`tests/programs/content.h`), computed once more.

const PAGE_WORDS: usize = 512;

/// A word that tells its place.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The hash as the programs report it.
pub fn hash(words: impl IntoIterator<Item = u64>) -> String {
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x0100_0000_01b3);
    let sum = words.into_iter().fold(0xcbf2_9ce4_8422_2325, step);
    format!("{sum:016x}")
}

/// The memory of a `writer MIB STRIDE`.
#[derive(Debug)]
pub struct Written {
    words: Vec<u64>,
    stride: usize,
    /// How many writes are in `words`.
    writes: u64,
}

impl Written {
    /// Before its first write.
    pub fn new(mib: usize, stride: usize) -> Self {
        let words = (1..=(mib as u64) << 17).map(mix).collect();
        Self {
            words,
            stride,
            writes: 0,
        }
    }

    /// The hash after so many writes, which are no fewer than at the last call.
    ///
    /// # Panics
    /// If they are.
    pub fn hash_after(&mut self, writes: u64) -> String {
        assert!(
            writes >= self.writes,
            "{writes} writes, after {}",
            self.writes
        );
        let hot = (self.words.len() / PAGE_WORDS).div_ceil(self.stride);
        for write in self.writes..writes {
            let n = usize::try_from(write).expect("64 bits");
            self.words[n % hot * self.stride * PAGE_WORDS + n / hot % PAGE_WORDS] = mix(!write);
        }
        self.writes = writes;
        hash(self.words.iter().copied())
    }
}

//! Mutations of bytes, all from one seed.

pub use crate::common::rng::Rng;

/// FNV-1a
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Numbers at which arithmetic goes wrong.
const NUMBERS: &[u64] = &[
    0,
    1,
    2,
    3,
    16,
    63,
    64,
    65,
    127,
    128,
    255,
    511,
    512,
    2048,
    4095,
    4096,
    32767,
    32768,
    65535,
    131072,
    262144,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 32,
    u64::MAX >> 1,
    1 << 63,
    u64::MAX,
];

pub struct Mutator {
    pub words: &'static [&'static [u8]],
}

impl Mutator {
    /// A variant of `input`; the bytes before `head` change more often. Others of the pool lend pieces.
    pub fn mutate(&self, input: &[u8], head: usize, pool: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
        let mut out = input.to_vec();
        for _ in 0..1 + rng.below(4) {
            self.step(&mut out, head, pool, rng);
        }
        out
    }

    fn step(&self, out: &mut Vec<u8>, head: usize, pool: &[Vec<u8>], rng: &mut Rng) {
        if out.is_empty() {
            out.push(rng.next() as u8);
        }
        let reach = if rng.below(8) == 0 { out.len() } else { head.clamp(1, out.len()) };
        let at = rng.index(reach);
        match rng.below(12) {
            0 => out[at] ^= 1 << rng.below(8),
            1 => out[at] = rng.next() as u8,
            2..=4 => {
                let word = NUMBERS[rng.index(NUMBERS.len())].to_le_bytes();
                let size = [4, 4, 4, 8][rng.index(4)];
                let at = at / 4 * 4;
                let size = size.min(out.len() - at);
                out[at..at + size].copy_from_slice(&word[..size]);
            }
            5 => {
                // A small change of a number.
                let at = (at / 4 * 4).min(out.len().saturating_sub(4));
                if let Some(word) = out.get_mut(at..at + 4) {
                    let n = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    let by = rng.below(5) as u32;
                    word.copy_from_slice(&n.wrapping_add(by).wrapping_sub(2).to_le_bytes());
                }
            }
            6 => {
                // A piece of it somewhere else.
                let (from, len) = (rng.index(reach), 1 + rng.index(64));
                let piece = out[from..(from + len).min(out.len())].to_vec();
                let end = (at + piece.len()).min(out.len());
                out[at..end].copy_from_slice(&piece[..end - at]);
            }
            7 => {
                let len = 1 + rng.mostly(4, 16, 4096);
                let end = (at + len).min(out.len());
                out.drain(at..end);
            }
            8 => {
                let (from, len) = (rng.index(reach), 1 + rng.mostly(8, 32, 4096));
                let piece = out[from..(from + len).min(out.len())].to_vec();
                let times = 1 + rng.mostly(16, 2, 200);
                out.splice(at..at, piece.repeat(times));
            }
            9 => {
                let other = &pool[rng.index(pool.len())];
                if !other.is_empty() {
                    let (from, len) = (rng.index(other.len()), 1 + rng.index(256));
                    let piece = &other[from..(from + len).min(other.len())];
                    let end = (at + piece.len()).min(out.len());
                    out.splice(at..end, piece.iter().copied());
                }
            }
            10 if !self.words.is_empty() => {
                let word = self.words[rng.index(self.words.len())];
                let end = if rng.below(2) == 0 { at } else { (at + word.len()).min(out.len()) };
                out.splice(at..end, word.iter().copied());
            }
            _ => out.truncate(if rng.below(4) == 0 { at } else { out.len() - rng.index(out.len().min(64)) }),
        }
    }
}

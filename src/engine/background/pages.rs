//! Which BAT pages of a level have entries: background work skips empty pages without reading them.

/// A set of BAT pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub fn new() -> PageSet {
        PageSet::default()
    }

    /// All pages below `end`.
    pub fn all(end: u32) -> PageSet {
        let mut set = PageSet::new();
        (0..end).for_each(|page| set.insert(page));
        set
    }

    pub fn insert(&mut self, page: u32) {
        let word = page as usize / 64;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (page % 64);
    }

    pub fn contains(&self, page: u32) -> bool {
        self.words.get(page as usize / 64).is_some_and(|w| w & 1 << (page % 64) != 0)
    }

    /// The first page of the set from `page` on.
    pub fn next(&self, page: u32) -> Option<u32> {
        let mut index = page as usize / 64;
        let mut word = self.words.get(index)? & (u64::MAX << (page % 64));
        while word == 0 {
            index += 1;
            word = *self.words.get(index)?;
        }
        Some(index as u32 * 64 + word.trailing_zeros())
    }

    /// Adds all pages of another set.
    pub fn add(&mut self, other: &PageSet) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        self.words.iter_mut().zip(&other.words).for_each(|(w, o)| *w |= o);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_in_order() {
        let mut set = PageSet::new();
        for page in [0, 63, 64, 700] {
            set.insert(page);
        }
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(page) = set.next(at) {
            found.push(page);
            at = page + 1;
        }
        assert_eq!(found, [0, 63, 64, 700]);
        assert_eq!(set.next(701), None);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(100_000));
        let mut other = PageSet::all(3);
        other.add(&set);
        assert!([0, 1, 2, 63, 700].iter().all(|p| other.contains(*p)));
    }
}

//! The geometry in headers and descriptors. No program computes with it; it must be the same that the classic writes.

/// Heads and cylinders of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub cylinders: u32,
    pub heads: u32,
}

/// Geometry of a disk of so many sectors (rounded to clusters).
pub fn chs(sectors: u64) -> Geometry {
    if sectors > 1_032_192 && sectors < 16_777_216 {
        return Geometry { cylinders: (sectors / 1008) as u32, heads: 16 };
    }
    let none = Geometry { cylinders: sectors as u32, heads: 1 };
    let Some(per_track) = [63, 32, 16, 8].into_iter().find(|n| sectors.is_multiple_of(*n)) else {
        return none;
    };
    let tracks = sectors / per_track;
    match [16, 8, 4, 2].into_iter().find(|n| tracks.is_multiple_of(*n)) {
        Some(heads) => Geometry { cylinders: (tracks / heads) as u32, heads: heads as u32 },
        None => none,
    }
}

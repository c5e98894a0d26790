//! The balloon: a hidden file in the root of the inner file system whose size is the space withheld from the user.

/// Name of the balloon file, mode 0600, owner root, empty when the disk is made.
pub const NAME: &str = ".balloon-c3a5ae3d-ce7f-43c4-a1ea-c61e2b4504e8";

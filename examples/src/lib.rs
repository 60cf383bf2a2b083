//! Examples live beside this file, one file each.

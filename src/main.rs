//! A placeholder for the commands.
fn main() {}

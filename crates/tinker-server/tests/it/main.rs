//! Integration tests of the server.

mod lifecycle;

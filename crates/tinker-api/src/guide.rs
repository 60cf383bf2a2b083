//! The Rust in the pages of the guide compiles.

macro_rules! page {
    ($name:ident, $file:literal) => {
        #[doc = include_str!(concat!("../../../docs/guide/", $file, ".md"))]
        struct $name;
    };
}

page!(Training, "training");
page!(Sampling, "sampling");
page!(Futures, "futures");
page!(ErrorsAndRetries, "errors-and-retries");
page!(CustomLosses, "custom-losses");
page!(Resuming, "resuming");
page!(Recording, "recording");

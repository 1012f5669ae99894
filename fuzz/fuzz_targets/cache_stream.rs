#![no_main]
image_fuzz::fuzz_target!(cache_stream);

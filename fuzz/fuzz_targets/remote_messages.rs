#![no_main]
image_fuzz::fuzz_target!(remote_messages);

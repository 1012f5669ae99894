#![no_main]
image_fuzz::fuzz_target!(stream_messages);

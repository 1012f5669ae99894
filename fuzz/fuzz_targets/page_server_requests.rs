#![no_main]
image_fuzz::fuzz_target!(page_server_requests);

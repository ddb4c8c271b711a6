//! Addresses that people write: of a control plane, and of servers. One that is taken in is the same after it was written
//! out and read again.

#![no_main]

use control_plane::Address;
use libfuzzer_sys::fuzz_target;
use receivers::ServerUrl;

fuzz_target!(|text: &str| {
    if let Ok(address) = text.parse::<Address>() {
        assert_eq!(address.to_string().parse::<Address>().expect("its own text"), address);
    }
    if let Ok(url) = text.parse::<ServerUrl>() {
        assert_eq!(url.to_string().parse::<ServerUrl>().expect("its own text"), url);
    }
});

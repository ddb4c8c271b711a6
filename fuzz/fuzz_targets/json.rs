//! The `config.json` of models, which may have Python's numbers: an edit changes what it is to change, and the document
//! stays one.

#![no_main]

use cli::checkpoint::JsonText;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(mut json) = JsonText::parse(text) else { return };
    let value = "fp8".into();
    if json.set(&["quantization_config", "quant_method"], &value) {
        assert_eq!(json.get(&["quantization_config", "quant_method"]), Some(value));
    }
    JsonText::parse(json.as_str()).expect("a document that was edited is one");
    for path in json.paths_of("quantization_config") {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        json.remove(&path);
    }
    JsonText::parse(json.as_str()).expect("a document that was edited is one");
});

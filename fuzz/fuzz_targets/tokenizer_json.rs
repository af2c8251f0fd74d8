//! Any bytes as `tokenizer.json`: refused with a message, or a tokenizer whose tokens decode to what they encode.
#![no_main]
use elleci_tools::data::tokenizer::Tokenizer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::from_json(bytes.to_vec(), None) {
        let text = "L'Italia è una Repubblica democratica, fondata sul lavoro.";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text)), text);
    }
});

//! Any bytes as a PyTorch file: refused with a message, or tensors that can all be read.
#![no_main]
use elleci_tools::pth::{Pth, Root, describe_misfit};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let file = match Pth::open(bytes) {
        Ok(file) => file,
        Err(e) => return assert!(!format!("{e:#}").is_empty()),
    };
    let mut values = vec![0.0; 256];
    let mut total = 0;
    for tensor in file.tensors() {
        let elements = tensor.view.elements();
        total += elements;
        let some = (elements as usize).min(values.len());
        file.read(tensor, 0, &mut values[..some]);
        file.read(tensor, elements - some as u64, &mut values[..some]);
        assert_eq!(tensor.shape().iter().product::<usize>() as u64, elements);
    }
    // What inspecting the file would allocate is bounded by its size.
    assert!(total <= bytes.len() as u64 + (1 << 16));
    if let Ok(roots) = Root::all(file.tensors()) {
        assert!(roots.iter().all(|r| r.tensors.values().all(|&i| i < file.tensors().len())));
    }
    assert!(!describe_misfit(file.tensors()).is_empty());
    let _ = file.verify(&mut |_| Ok(()));
});

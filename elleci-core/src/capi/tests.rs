//! What a C program cannot provoke; the rest is `tests/capi/main.c`.

use core::mem::MaybeUninit;

use super::status::{Failure, Guarded, call};
use super::*;
use crate::archive::ArchiveError;
use crate::inference::InferenceError;

fn text(message: &MaybeUninit<ElleciMessage>) -> std::string::String {
    // SAFETY: zeroed at first, and all zeros are a message.
    let message = unsafe { message.assume_init_ref() };
    let bytes: Vec<u8> = message.text.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
    std::string::String::from_utf8(bytes).unwrap()
}

#[test]
fn a_panic_ends_at_the_boundary_and_closes_what_it_left_half_done() {
    let guarded = Guarded::new("session", 1);
    let mut message = MaybeUninit::zeroed();
    let status = call(Some(&mut message), || guarded.with(|_| -> Result<(), Failure> { panic!("on {}", "purpose") }));
    assert_eq!(status, ElleciStatus::Internal);
    assert!(text(&message).ends_with("please report it: on purpose"), "{}", text(&message));

    let status = call(Some(&mut message), || guarded.with(|_| Ok(())));
    assert_eq!(status, ElleciStatus::Internal);
    assert!(text(&message).contains("earlier call failed"), "{}", text(&message));
    // A new value is sound again, and whoever is broken may be freed.
    guarded.free().unwrap();
    guarded.replace(|v| *v = 2).unwrap();
    assert_eq!(guarded.with(|v| Ok(*v)).unwrap(), 2);
}

#[test]
fn a_refusal_leaves_all_sound() {
    let all = [Guarded::new("session", 1), Guarded::new("session", 2)];
    let twice = Guarded::with_all([&all[0], &all[1], &all[0]].into_iter(), |_| Ok(()));
    assert_eq!(twice.unwrap_err().status, ElleciStatus::Busy);
    let refused = all[0].with(|_| -> Result<(), Failure> { Err(InferenceError::NoTokens.into()) });
    assert_eq!(refused.unwrap_err().status, ElleciStatus::NoTokens);
    assert_eq!(Guarded::with_all(all.iter(), |v| Ok(*v[0] + *v[1])).unwrap(), 3);
}

#[test]
fn a_message_that_is_too_long_is_cut_between_characters() {
    let mut message = MaybeUninit::zeroed();
    // Two bytes each: 511 bytes of room end inside of the 256th.
    let long = "è".repeat(300);
    call(Some(&mut message), || Err(Failure::new(ElleciStatus::Io, long)));
    assert_eq!(text(&message), "è".repeat(255));
}

#[test]
fn codes_that_need_a_huge_model_or_a_poor_machine() {
    let status = |error: InferenceError| Failure::from(error).status;
    assert_eq!(status(InferenceError::Memory { bytes: 1 }), ElleciStatus::Memory);
    assert_eq!(status(InferenceError::Archive(ArchiveError::Header)), ElleciStatus::Archive);
}

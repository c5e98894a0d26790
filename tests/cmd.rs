//! Transcripts of the command: what is typed, what is answered, how it ends. None needs root or a device.

#[test]
fn transcripts() {
    trycmd::TestCases::new().case("tests/cmd/*.trycmd");
}

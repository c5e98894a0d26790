//! What messages look like to other versions.

use super::*;

#[test]
fn messages_of_the_first_version_are_read() {
    let first = Greeting::default();
    let own = own_greeting();
    assert!(first.commands.iter().all(|c| own.commands.contains(c)), "{own:?}");
    own.replaces(&first).unwrap();
    let ready = r#"{"Ready":{"device_bytes":1,"cluster_sectors":2,"fmt_version":2,"was_marked":false,"direct":true}}"#;
    let FromWorker::Ready(ready) = serde_json::from_str(ready).unwrap() else { panic!("not Ready") };
    assert_eq!(ready.greeting, first);
    let text = r#"{"Closed":{"error":[16,"lost"]}}"#;
    let closed: FromWorker = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&closed).unwrap(), text);
    let record = serde_json::to_value(DeviceRecord { greeting: own.clone(), ..Default::default() }).unwrap();
    let mut old = record.clone();
    old.as_object_mut().unwrap().remove("greeting");
    assert_eq!(serde_json::from_value::<DeviceRecord>(old).unwrap().greeting, first);
    assert_eq!(serde_json::from_value::<DeviceRecord>(record).unwrap().greeting, own);
}

#[test]
fn test_hooks_are_no_part_of_a_release() {
    let succession = Succession { wait: false, new_top: false, commit: None, grow: None, linger: 60 };
    let text = serde_json::to_string(&succession).unwrap();
    assert_eq!(text.contains("linger"), cfg!(debug_assertions));
    let sent = r#"{"new_top":false,"commit":null,"linger":60}"#;
    let got: Succession = serde_json::from_str(sent).unwrap();
    assert_eq!(got.linger, if cfg!(debug_assertions) { 60 } else { 0 });
}

#[test]
fn an_unsupported_command_is_an_error_by_name() {
    let answer = Answer::Unsupported { what: "Grow".into(), version: 2 };
    let e = answer.into_result().unwrap_err();
    assert_eq!(e.code(), 38);
    assert!(e.to_string().contains("Grow") && e.to_string().contains("version 2"), "{e}");
    let refused = DeviceRecord { name: "ploop7".into(), ..Default::default() };
    assert!(refused.refuse(&Command::Info).is_none());
}

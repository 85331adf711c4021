//! The result of one check of one object.

use std::fmt;

use serde::Serialize;

/// Severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// Correct, or not applicable to this host.
    Pass,
    /// The daemon would serve, but slower or less safely; or the doctor cannot tell.
    Warn,
    /// The daemon could not serve, or would serve wrongly.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Pass => "PASS",
            Status::Warn => "WARN",
            Status::Fail => "FAIL",
        })
    }
}

/// Result of one check of one object. `Display` prints it as `STATUS check object: reason. Fix: command`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Severity.
    pub status: Status,
    /// Name of the check, as in docs/doctor.md.
    pub check: &'static str,
    /// Checked object: a device, a path, a process, a setting, or the whole host.
    pub what: String,
    /// State of the object, its consequence, and a remedy that is no command.
    pub why: String,
    /// Shell command that fixes the problem, if there is one.
    pub fix: Option<String>,
}

impl Finding {
    fn new(
        status: Status,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Finding { status, check, what: what.into(), why: why.into(), fix: None }
    }

    /// Returns a finding with [`Status::Pass`].
    pub(super) fn pass(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Pass, check, what, why)
    }

    /// Returns a finding with [`Status::Warn`].
    pub(super) fn warn(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Warn, check, what, why)
    }

    /// Returns a finding with [`Status::Fail`].
    pub(super) fn fail(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Fail, check, what, why)
    }

    /// Adds the command that fixes the problem.
    pub(super) fn fix(mut self, command: impl Into<String>) -> Self {
        self.fix = Some(command.into());
        self
    }

    /// Turns a FAIL into a WARN, for a device that the operator did not name.
    pub(super) fn downgrade(&mut self) {
        if self.status == Status::Fail {
            self.status = Status::Warn;
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{} {} {}: {}", self.status, self.check, self.what, self.why);
        if let Some(fix) = &self.fix {
            line = format!("{line}. Fix: {fix}");
        }
        // Other users choose names and command lines, and a terminal obeys control characters.
        f.write_str(&line.replace(char::is_control, "?"))
    }
}

/// Quotes text as one word of a shell command.
pub(super) fn quoted(text: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !text.is_empty() && text.chars().all(harmless) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_for_the_shell() {
        assert_eq!(quoted("vnet0"), "vnet0");
        assert_eq!(quoted("$(reboot)"), "'$(reboot)'");
        assert_eq!(quoted("a'b"), r"'a'\''b'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn control_characters_are_replaced() {
        let finding = Finding::fail("tap-state", "a\x1b[2J", "is\ndown").fix("ip link");
        assert_eq!(finding.to_string(), "FAIL tap-state a?[2J: is?down. Fix: ip link");
        let json = serde_json::to_value(&finding).unwrap();
        assert_eq!((&json["status"], &json["check"]), (&"FAIL".into(), &"tap-state".into()));
    }
}

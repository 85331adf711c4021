//! One thing that was looked at, and what came of it.

use std::fmt;

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// As it should be, or of no concern here.
    Pass,
    /// The daemon serves, but slower or less safely than it could; or it can't be known.
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

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub status: Status,
    /// Which check it is of.
    pub check: &'static str,
    /// What was looked at.
    pub what: String,
    /// What was seen, and what it means.
    pub why: String,
    /// The command that mends it, where one does.
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

    /// It is as it should be.
    pub(super) fn pass(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Pass, check, what, why)
    }

    /// It is slower or less safe than it could be, or unknown.
    pub(super) fn warn(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Warn, check, what, why)
    }

    /// The daemon could not serve, or not rightly.
    pub(super) fn fail(
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
    ) -> Self {
        Self::new(Status::Fail, check, what, why)
    }

    /// With the command that mends it.
    pub(super) fn fix(mut self, command: impl Into<String>) -> Self {
        self.fix = Some(command.into());
        self
    }

    /// A failure becomes a warning: of a device that nobody asked about.
    pub(super) fn soften(&mut self) {
        if self.status == Status::Fail {
            self.status = Status::Warn;
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = format!("{} {} — {}", self.status, self.what, self.why);
        if let Some(fix) = &self.fix {
            line = format!("{line} — {fix}");
        }
        // Names and command lines are others' to choose, and a terminal obeys control characters.
        f.write_str(&line.replace(char::is_control, "?"))
    }
}

/// Text as one word of a shell's command, whatever it holds.
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
    fn a_name_can_not_smuggle_a_command_into_a_cure() {
        assert_eq!(quoted("vnet0"), "vnet0");
        assert_eq!(quoted("$(reboot)"), "'$(reboot)'");
        assert_eq!(quoted("a'b"), r"'a'\''b'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn a_finding_is_a_line_whatever_its_words_hold() {
        let finding = Finding::fail("tap", "tap a\x1b[2J", "it is\ndown").fix("ip link");
        assert_eq!(finding.to_string(), "FAIL tap a?[2J — it is?down — ip link");
        let json = serde_json::to_value(&finding).unwrap();
        assert_eq!((&json["status"], &json["check"]), (&"FAIL".into(), &"tap".into()));
    }
}

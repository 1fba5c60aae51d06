//! `uhmm doctor`: what this machine lets uhmm do, what is lost without the rest, and how to get it.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use serde::Serialize;
use uhmm_sys::probe::{self, Finding, Need, Report, Status, Verdict};

/// Says what this machine lets uhmm do, what is lost without the rest, and how to get it.
///
/// Exit status: 0 where all that `uhmm run` needs is there, 1 where it works with limits, 2 where it cannot run.
/// UHMM_MASK (a comma-separated list of the names below) makes capabilities count as missing.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Tries every capability and prints what was found.
///
/// # Errors
/// The standard output cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let report = probe::probe();
    let text = if args.json { json(&report)? } else { table(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough (`| head`) is no reason to complain.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        answer => answer?,
    }
    Ok(ExitCode::from(exit_status(report.verdict())))
}

const fn exit_status(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Full => 0,
        Verdict::Limited => 1,
        Verdict::CannotRun => 2,
    }
}

const fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Full => "full",
        Verdict::Limited => "limited",
        Verdict::CannotRun => "cannot-run",
    }
}

const fn status_word(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Degraded => "degraded",
        Status::Missing => "missing",
    }
}

const fn need_word(need: Need) -> &'static str {
    match need {
        Need::Fact => "fact",
        Need::Speed => "speed",
        Need::Limit => "limit",
        Need::Required => "required",
    }
}

#[derive(Serialize)]
struct JsonReport<'r> {
    verdict: &'static str,
    exit_status: u8,
    capabilities: Vec<JsonFinding<'r>>,
    unknown_masks: &'r [String],
}

#[derive(Serialize)]
struct JsonFinding<'r> {
    name: &'static str,
    status: &'static str,
    need: &'static str,
    detail: &'r str,
    lost: Option<&'static str>,
    grant: Option<&'r str>,
}

fn json(report: &Report) -> Result<String> {
    let capabilities = report.findings.iter().map(|finding| JsonFinding {
        name: finding.cap.name(),
        status: status_word(finding.status),
        need: need_word(finding.cap.need()),
        detail: &finding.detail,
        lost: finding.lost,
        grant: finding.grant.as_deref(),
    });
    let report = JsonReport {
        verdict: verdict_word(report.verdict()),
        exit_status: exit_status(report.verdict()),
        capabilities: capabilities.collect(),
        unknown_masks: &report.unknown_masks,
    };
    Ok(serde_json::to_string_pretty(&report)? + "\n")
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        row(&mut text, finding);
    }
    for name in &report.unknown_masks {
        line(&mut text, format_args!("{}: there is no capability `{name}`", probe::MASK_VARIABLE));
    }
    let summary = match report.verdict() {
        Verdict::Full => "All that `uhmm run` needs is there.",
        Verdict::Limited => "`uhmm run` works here, with the limits above.",
        Verdict::CannotRun => "`uhmm run` cannot work here.",
    };
    line(&mut text, format_args!("\n{summary}"));
    text
}

fn row(text: &mut String, finding: &Finding) {
    // One of several ways to the same end: not a fault, so not shown as one.
    let word = match (finding.cap.need(), finding.status) {
        (Need::Fact, Status::Missing) => "-",
        (_, status) => status_word(status),
    };
    line(text, format_args!("{word:9} {:15} {}", finding.cap.name(), finding.detail));
    if let Some(lost) = finding.lost {
        line(
            text,
            format_args!("{:26}{}: {lost}", "", if finding.cap.need() == Need::Speed { "slower" } else { "lost" }),
        );
    }
    if let Some(grant) = &finding.grant {
        line(text, format_args!("{:26}get it: {grant}", ""));
    }
}

fn line(text: &mut String, args: std::fmt::Arguments<'_>) {
    writeln!(text, "{args}").expect("a string takes what is written to it");
}

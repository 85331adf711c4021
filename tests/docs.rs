//! The documentation names only files, headings, options, commands, modules, metrics, keys and messages
//! that exist. These tests check names, not wording.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use vhost_user_net::counters::{CopyReason, DropReason};
use vhost_user_net::{cli, config};
use vmm_sys_util::tempdir::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Placeholders in documented messages.
const PLACEHOLDERS: [&str; 11] =
    ["NAME", "N", "PATH", "FILE", "ERROR", "WHY", "MAC", "RING", "REQUEST", "ADDRESS", "VALUE"];

/// A page. Links start from the directory of `name`.
pub(crate) struct Page {
    name: String,
    text: String,
}

impl Page {
    fn new(name: &str, text: &str) -> Self {
        Page { name: name.into(), text: text.into() }
    }

    pub(crate) fn read(name: &str) -> Self {
        Page::new(name, &fs::read_to_string(Path::new(ROOT).join(name)).unwrap())
    }

    /// Reads the README and all pages of docs/.
    fn all() -> Vec<Page> {
        let docs = fs::read_dir(Path::new(ROOT).join("docs")).unwrap();
        let names = docs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> =
            names.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
        names.sort();
        ["README.md".to_owned()].iter().chain(&names).map(|name| Page::read(name)).collect()
    }

    /// Returns the indented and fenced blocks, each with its blank lines, and the rest.
    pub(crate) fn blocks(&self) -> (Vec<String>, String) {
        let (mut blocks, mut rest) = (Vec::<String>::new(), String::new());
        let (mut in_block, mut fenced, mut after_blank) = (false, false, true);
        for line in self.text.lines() {
            if line.starts_with("```") {
                fenced = !fenced;
                continue;
            }
            let indented = line.starts_with("    ") && (in_block || after_blank);
            let blank = line.trim().is_empty();
            if fenced || indented || (in_block && blank) {
                if !in_block {
                    blocks.push(String::new());
                }
                in_block = true;
                if let Some(block) = blocks.last_mut() {
                    *block += line.strip_prefix("    ").unwrap_or(line);
                    block.push('\n');
                }
            } else {
                in_block = false;
                rest += line;
                rest.push('\n');
            }
            after_blank = blank;
        }
        (blocks, rest)
    }

    /// Returns the code spans within lines.
    pub(crate) fn spans(&self) -> Vec<String> {
        let rest = self.blocks().1;
        let spans = rest.split('`').skip(1).step_by(2);
        spans.map(|span| span.replace("\\|", "|").replace('\n', " ")).collect()
    }

    /// Returns the code in the first cells of all tables whose first head is `head`.
    pub(crate) fn first_cells(&self, head: &str) -> Vec<String> {
        let mut cells = Vec::new();
        let mut wanted = false;
        let mut last = "";
        for line in self.text.lines() {
            if line.starts_with("|---") {
                wanted = cell(last) == head;
            } else if !line.starts_with('|') {
                wanted = false;
            } else if wanted {
                let code = cell(line);
                let code = code.split('`').skip(1).step_by(2);
                cells.extend(code.map(|code| code.replace("\\|", "|")));
            }
            last = line;
        }
        cells
    }

    /// Returns the cells of one column, of all tables that have it.
    fn column(&self, head: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut column = None;
        let mut last = "";
        for line in self.text.lines() {
            if line.starts_with("|---") {
                column = cells(last).iter().position(|cell| cell == head);
            } else if !line.starts_with('|') {
                column = None;
            } else if let Some(cell) = column.and_then(|column| cells(line).into_iter().nth(column))
            {
                found.push(cell);
            }
            last = line;
        }
        found
    }

    /// Returns the anchors of the headings.
    fn anchors(&self) -> BTreeSet<String> {
        let headings = self.text.lines().filter_map(|line| line.strip_prefix('#'));
        let anchor = |heading: &str| -> String {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        };
        headings.map(anchor).collect()
    }
}

/// Returns the cells of a table's row.
fn cells(row: &str) -> Vec<String> {
    let row = row.trim_start_matches('|').replace("\\|", "\0");
    row.split('|').map(|cell| cell.trim().replace('\0', "\\|")).collect()
}

/// Returns the first cell of a table's row.
fn cell(row: &str) -> String {
    cells(row).swap_remove(0)
}

/// Reports whether a word is a placeholder, such as `PORT` or `…`.
fn is_placeholder(word: &str) -> bool {
    word.contains('…') || word.contains('*') || word.chars().any(|c| c.is_ascii_uppercase())
}

/// Returns complaints about links to missing files or headings.
fn wrong_links(page: &Page) -> Vec<String> {
    let mut wrong = Vec::new();
    let rest = page.blocks().1;
    for target in rest.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if target.starts_with("http") {
            continue;
        }
        let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
        let directory = Path::new(&page.name).parent().unwrap_or(Path::new(""));
        let place = if path.is_empty() { PathBuf::from(&page.name) } else { directory.join(path) };
        if !Path::new(ROOT).join(&place).exists() {
            wrong.push(format!("there is no {path}"));
        } else if !anchor.is_empty() {
            let other;
            let linked = if path.is_empty() {
                page
            } else {
                other = Page::read(&place.to_string_lossy());
                &other
            };
            if !linked.anchors().contains(anchor) {
                wrong.push(format!("{path} has no heading for #{anchor}"));
            }
        }
    }
    wrong
}

/// Returns complaints about missing files of this repository.
fn wrong_paths(page: &Page) -> Vec<String> {
    let entries = fs::read_dir(ROOT).unwrap().map(Result::unwrap);
    let directories: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap() + "/")
        .filter(|name| !["target/", ".git/"].contains(&name.as_str()))
        .collect();
    // Build results are not in the repository.
    let ignored: Vec<String> = [".gitignore", "tests/fuzz/.gitignore"]
        .iter()
        .flat_map(|file| {
            let directory = Path::new(file).parent().unwrap_or(Path::new("")).to_owned();
            let text = fs::read_to_string(Path::new(ROOT).join(file)).unwrap_or_default();
            let paths = text.lines().map(|line| directory.join(line.trim_start_matches('/')));
            paths.map(|path| path.to_string_lossy().into_owned()).collect::<Vec<_>>()
        })
        .collect();
    let separates = |c: char| c.is_whitespace() || "()[]{}<>,;\"'|`=".contains(c);
    let mut wrong = Vec::new();
    for word in page.text.split(separates) {
        let word =
            word.split('#').next().unwrap_or_default().trim_end_matches(['.', ':', '!', '?']);
        let path = word.strip_prefix("./").unwrap_or(word);
        let ours = word.starts_with("./") || directories.iter().any(|name| path.starts_with(name));
        if !ours || path.is_empty() {
            continue;
        }
        let known =
            path.split('/').take_while(|part| !is_placeholder(part) || part.ends_with(".md"));
        let path: PathBuf = known.collect();
        let ignored = ignored.iter().any(|made| path.starts_with(made));
        if !ignored && !Path::new(ROOT).join(&path).exists() {
            wrong.push(format!("there is no {}", path.display()));
        }
    }
    wrong
}

/// Returns complaints about the words after `vhost-user-net`.
fn wrong_words(program: &clap::Command, words: &[&str]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut path = vec![program];
    let mut words = words.iter().map(|word| word.trim_matches(['[', ']', ',', ';']));
    while let Some(word) = words.next() {
        let here = path[path.len() - 1];
        if ["|", "||", "&&", "&", ";", "\\"].contains(&word) || word.starts_with(['>', '<']) {
            break;
        }
        let mut options = path.iter().enumerate().flat_map(|(depth, command)| {
            let last = depth + 1 == path.len();
            command.get_arguments().filter(move |arg| last || arg.is_global_set())
        });
        if let Some(option) = word.strip_prefix("--") {
            let (name, value) = match option.split_once(['=', '[']) {
                Some((name, _)) => (name, true),
                None => (option, false),
            };
            match options.find(|arg| arg.get_long() == Some(name)) {
                Some(arg) if arg.get_action().takes_values() && !value => {
                    let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
                    if !optional {
                        words.next();
                    }
                }
                Some(_) => {}
                None if is_placeholder(name) || ["help", "version"].contains(&name) => {}
                None => wrong.push(format!("{} has no option --{name}", here.get_name())),
            }
        } else if let Some(short) = word.strip_prefix('-').filter(|rest| rest.len() == 1) {
            match options.find(|arg| arg.get_short() == short.chars().next()) {
                Some(_) => drop(words.next()),
                None => wrong.push(format!("{} has no option -{short}", here.get_name())),
            }
        } else if here.has_subcommands() && !is_placeholder(word) && !word.is_empty() {
            for name in word.split('|') {
                match here.find_subcommand(name) {
                    Some(command) => path.push(command),
                    None => wrong.push(format!("{} has no command {name}", here.get_name())),
                }
            }
        }
    }
    wrong
}

/// Splits a command line into words, without prompts, assignments and wrappers before the program.
fn program_words(line: &str) -> Vec<&str> {
    let mut words = line.split_whitespace().peekable();
    while let Some(word) = words.peek() {
        let assignment = word.split_once('=').is_some_and(|(name, _)| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
        });
        let number = word.chars().all(|c| c.is_ascii_digit());
        let before = ["$", "#", "exec", "nice", "timeout", "sudo", "setpriv"].contains(word);
        if !assignment && !before && !number {
            break;
        }
        words.next();
    }
    words.collect()
}

/// Returns the long options of a command and its subcommands.
fn all_options(command: &clap::Command) -> BTreeSet<String> {
    let own = command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned));
    own.chain(command.get_subcommands().flat_map(all_options)).collect()
}

/// Returns complaints about unknown commands and options.
fn wrong_commands(page: &Page) -> Vec<String> {
    let program = cli::command();
    let ctl = program.find_subcommand("ctl").unwrap();
    let options = all_options(&program);
    let mut wrong = Vec::new();
    let mut check = |line: &str| {
        let words = program_words(line);
        let Some(first) = words.first() else { return };
        let cargo: Vec<&str> =
            words.iter().copied().filter(|word| !word.starts_with("--")).collect();
        if *first == "vhost-user-net" || first.ends_with("/vhost-user-net") {
            wrong.extend(wrong_words(&program, &words[1..]));
        } else if *first == "ctl" {
            wrong.extend(wrong_words(ctl, &words[1..]));
        } else if let Some(option) = first.strip_prefix("--") {
            let name = option.split(['=', '[', '`']).next().unwrap_or_default();
            if !options.contains(name) && !is_placeholder(name) {
                wrong.push(format!("there is no option --{name}"));
            }
        } else if cargo.starts_with(&["cargo", "bench"]) {
            let known = fs::read_to_string(Path::new(ROOT).join("tests/bench/main.rs")).unwrap();
            for part in &cargo[2..] {
                if !known.contains(&format!("(\"{part}\", ")) {
                    wrong.push(format!("there is no benchmark {part}"));
                }
            }
        } else if cargo.starts_with(&["cargo", "test", "integration"]) {
            for module in &cargo[3..] {
                let name = module.split("::").next().unwrap_or_default();
                if name != "tests" && !test_modules().contains(name) {
                    wrong.push(format!("there is no test module {name}"));
                }
            }
        }
    };
    for block in page.blocks().0 {
        block.replace("\\\n", " ").lines().for_each(&mut check);
    }
    page.spans().iter().for_each(|span| check(span));
    // Tables of commands, for `ctl` or the program.
    for command in page.first_cells("command") {
        if !command.starts_with("vhost-user-net") {
            let words: Vec<&str> = command.split_whitespace().collect();
            wrong.extend(wrong_words(ctl, &words));
        }
    }
    wrong
}

/// Returns the modules of the integration tests.
fn test_modules() -> BTreeSet<String> {
    let main = fs::read_to_string(Path::new(ROOT).join("tests/main.rs")).unwrap();
    let names = main.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    names.map(str::to_owned).collect()
}

/// Reports whether `directory` has a module or item of this path.
fn has_item(directory: &Path, parts: &[&str]) -> bool {
    let mut place = directory.to_owned();
    let depth = parts.iter().take_while(|part| {
        let below = place.join(part);
        let is_there = below.with_extension("rs").exists() || below.is_dir();
        if is_there {
            place = below;
        }
        is_there
    });
    let depth = depth.count();
    let text = fs::read_to_string(place.with_extension("rs")).unwrap_or_default();
    parts[depth..].iter().all(|item| text.contains(item))
}

/// Returns complaints about unknown modules and items, such as `guest::notify`.
fn wrong_modules(page: &Page) -> Vec<String> {
    let mut wrong = Vec::new();
    for span in page.spans() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
        if !span.contains("::") || span.ends_with("::") || !span.chars().all(is_name) {
            continue;
        }
        let parts: Vec<&str> = span.split("::").collect();
        let root = Path::new(ROOT);
        let homes = [root.join("src"), root.join("tests")];
        let of_ours = homes.iter().filter(|home| {
            home.join(parts[0]).with_extension("rs").exists() || home.join(parts[0]).is_dir()
        });
        let of_ours: Vec<&PathBuf> = of_ours.collect();
        // Without a module of that name, the path is of another crate.
        if !of_ours.is_empty() && !of_ours.iter().any(|home| has_item(home, &parts)) {
            wrong.push(format!("there is no {span}"));
        }
    }
    wrong
}

/// Returns complaints about unknown metrics.
fn wrong_metrics(page: &Page) -> Vec<String> {
    let reference = Page::read("docs/reference.md").text;
    let separates = |c: char| !(c.is_ascii_lowercase() || c == '_');
    let named = page.text.split(separates).filter(|word| word.starts_with("vhost_user_net_"));
    let known = |word: &&str| {
        let of_histogram = ["_bucket", "_sum", "_count"];
        let whole = of_histogram.iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
        word.ends_with('_')
            || [word, whole].iter().any(|name| reference.contains(&format!("`{name}`")))
    };
    named.filter(|word| !known(word)).map(|word| format!("there is no metric {word}")).collect()
}

/// Returns complaints about keys and values of configuration files on a page.
fn wrong_files(page: &Page) -> Vec<String> {
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let file = directory.as_path().join("file");
    let is_toml = |line: &&str| {
        let key = line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
        // A further line of a list.
        let item = line.starts_with([' ', ']']);
        line.is_empty() || line.starts_with('[') || key || item
    };
    let mut wrong = Vec::new();
    for block in page.blocks().0.iter().filter(|block| block.contains("[[port]]")) {
        let lines: Vec<&str> = block.lines().filter(is_toml).collect();
        fs::write(&file, lines.join("\n")).unwrap();
        // A page may show a part of a port.
        match config::read_file(&file) {
            Err(why) if !why.contains("specify exactly one of") => wrong.push(why),
            _ => {}
        }
    }
    wrong
}

/// Returns complaints about rows outside a table, which Markdown shows as text.
fn wrong_rows(page: &Page) -> Vec<String> {
    let rest = page.blocks().1;
    let lines: Vec<&str> = rest.lines().collect();
    let is_row = |place: usize| lines.get(place).is_some_and(|line| line.starts_with('|'));
    let is_head = |place: usize| lines.get(place + 1).is_some_and(|it| it.starts_with("|---"));
    let begins = |place: &usize| is_row(*place) && (*place == 0 || !is_row(*place - 1));
    let wrong = (0..lines.len()).filter(begins).filter(|place| !is_head(*place));
    wrong.map(|place| format!("a row outside a table: {:.40}", lines[place])).collect()
}

fn wrong(page: &Page) -> Vec<String> {
    let checks = [
        wrong_links,
        wrong_paths,
        wrong_commands,
        wrong_modules,
        wrong_metrics,
        wrong_files,
        wrong_rows,
    ];
    checks.iter().flat_map(|check| check(page)).collect()
}

#[test]
fn names_in_pages_exist() {
    let complaints: Vec<String> = Page::all()
        .iter()
        .flat_map(|page| wrong(page).into_iter().map(|what| format!("{}: {what}", page.name)))
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn wrong_names_in_pages_are_found() {
    let cases = [
        ("[x](nowhere.md)", "there is no nowhere.md"),
        ("[x](docs/monitoring.md#no-such-heading)", "docs/monitoring.md has no heading"),
        ("[x](#no-such-heading)", "has no heading for #no-such-heading"),
        ("see tests/no-such-test.rs.", "there is no tests/no-such-test.rs"),
        ("run `./no-such-script`", "there is no no-such-script"),
        ("`--no-such-option=on` does nothing", "there is no option --no-such-option"),
        ("`vhost-user-net --frobnicate`", "no option --frobnicate"),
        ("`vhost-user-net frobnicate`", "no command frobnicate"),
        ("`ctl frobnicate`", "ctl has no command frobnicate"),
        ("`ctl add|frobnicate`", "ctl has no command frobnicate"),
        ("`ctl show PORT --busy-poll=3`", "show has no option --busy-poll"),
        ("`ctl capture PORT -x FILE`", "capture has no option -x"),
        ("text\n\n    vhost-user-net --tap=x \\\n        --tup=y | cat\n", "no option --tup"),
        ("text\n\n    $ A=b vhost-user-net ctl lost\n", "ctl has no command lost"),
        ("| command | |\n|---|---|\n| `lost` | |\n", "ctl has no command lost"),
        ("`cargo bench -- nothing`", "no benchmark nothing"),
        ("`cargo test --test integration -- nothing::`", "no test module nothing"),
        ("`guest::nothing`", "there is no guest::nothing"),
        ("`vhost_user_net_nothing_total`", "no metric vhost_user_net_nothing_total"),
        ("text\n\n    [[port]]\n    tup = \"x\"\n", "unknown field `tup`"),
        ("text\n| a | b |\n", "a row outside a table"),
    ];
    for (text, complaint) in cases {
        let found = wrong(&Page::new("README.md", text));
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(found[0].contains(complaint), "{text}: {found:?}");
    }
    let right = "# A heading\n[x](#a-heading), `ctl add|remove`, `vhost-user-net ctl --json show vm1`,\
                 `--tap=NAME`, tests/run, `ethtool --nonsense`, `docs::wrong_links`, `cargo bench -- tap`";
    assert_eq!(wrong(&Page::new("README.md", right)), Vec::<String>::new());
}

/// Returns the word after `before`.
fn figure(page: &str, before: &str) -> String {
    let text = Page::read(page).text;
    let rest = text.split_once(before).unwrap_or_else(|| panic!("{page} lacks {before:?}")).1;
    rest.split([' ', '|', ';', ',']).find(|word| !word.is_empty()).unwrap().to_owned()
}

#[test]
fn repeated_figures_agree() {
    // Memory of each further port, from the measured table.
    let kib = |ports: &str| -> f64 {
        figure("docs/compare/compare.md", &format!("vhost-user-net, {ports} ports |"))
            .parse()
            .unwrap()
    };
    let each = ((kib("64") - kib("1")) / 63.0).round();
    for page in ["docs/benchmarks.md", "docs/operating.md"] {
        let figure = format!(" {each} KiB");
        assert!(Page::read(page).text.contains(&figure), "{page} lacks{figure}");
    }
    // TCP throughput relative to QEMU's own device.
    let compare = Page::read("docs/compare/compare.md").text;
    let table = compare.split("## A Linux guest in QEMU, TCP, Mbit/s").nth(1).unwrap();
    let numbers = |row: &str| -> Vec<f64> {
        let cells = table.lines().find_map(|line| line.strip_prefix(row)).unwrap();
        cells.split('|').filter_map(|cell| cell.trim().parse().ok()).collect()
    };
    let (ours, theirs) =
        (numbers("| vhost-user-net, TAP |"), numbers("| QEMU's own virtio-net, TAP |"));
    let benchmarks = Page::read("docs/benchmarks.md").text;
    for way in 0..2 {
        let ratio = format!("{:.2}", ours[way] / theirs[way]);
        assert!(benchmarks.contains(&ratio), "docs/benchmarks.md lacks {ratio}");
    }
}

#[test]
fn module_tables_are_complete() {
    let listed = |page: &str| -> BTreeSet<String> {
        let cells = Page::read(page).column("module");
        let codes = cells.iter().flat_map(|cell| cell.split('`').skip(1).step_by(2));
        codes.map(str::to_owned).collect()
    };
    let modules = listed("docs/architecture.md");
    for module in &modules {
        let path = Path::new(ROOT).join("src").join(module.replace("::", "/"));
        assert!(path.with_extension("rs").exists(), "docs/architecture.md: there is no {module}");
    }
    let source = fs::read_to_string(Path::new(ROOT).join("src/lib.rs")).unwrap();
    for module in source.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
    {
        assert!(modules.contains(module), "docs/architecture.md does not have {module}");
    }
    let mut modules = test_modules();
    modules.remove("support");
    assert_eq!(listed("docs/testing.md"), modules, "docs/testing.md");
}

#[test]
fn drop_and_copy_reasons_are_explained() {
    let text = Page::read("docs/monitoring.md").text;
    let reasons = DropReason::ALL
        .map(DropReason::name)
        .into_iter()
        .chain(CopyReason::ALL.map(CopyReason::name));
    for reason in reasons {
        assert!(text.contains(&format!("`{reason}`")), "{reason} is not explained");
    }
}

/// Returns the text of each source file, without its tests.
fn sources(directory: &Path) -> Vec<String> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            texts.extend(sources(&entry.path()));
        } else {
            let text = fs::read_to_string(entry.path()).unwrap();
            texts.push(text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_owned());
        }
    }
    texts
}

/// Returns the string literals of a source text with their positions. Each `{…}` becomes one NUL.
fn literals(source: &str) -> Vec<(usize, String)> {
    let mut literals = Vec::new();
    let mut chars = source.char_indices().peekable();
    while let Some((place, c)) = chars.next() {
        let next = chars.peek().map(|(_, c)| *c);
        match (c, next) {
            ('/', Some('/')) => while chars.next_if(|(_, c)| *c != '\n').is_some() {},
            // A character, as '"' or '\''; not a lifetime.
            ('\'', Some(inner))
                if source[place + 1 + inner.len_utf8()..].starts_with('\'') || inner == '\\' =>
            {
                chars.next();
                chars.next();
            }
            ('"', _) => literals.push((place, literal(&mut chars))),
            _ => {}
        }
    }
    literals
}

/// Reads the rest of a string literal.
fn literal(chars: &mut std::iter::Peekable<std::str::CharIndices<'_>>) -> String {
    let mut text = String::new();
    while let Some((_, c)) = chars.next() {
        match c {
            '"' => break,
            '\\' => match chars.next() {
                Some((_, '\n')) => while chars.next_if(|(_, c)| c.is_whitespace()).is_some() {},
                Some((_, 'n')) => text.push('\n'),
                Some((_, c)) => text.push(c),
                None => break,
            },
            '{' if chars.next_if(|(_, c)| *c == '{').is_some() => text.push('{'),
            '{' => {
                while chars.next_if(|(_, c)| *c != '}').is_some() {}
                chars.next();
                text.push('\0');
            }
            _ => text.push(c),
        }
    }
    text
}

/// Returns the parts of a message between placeholders and system errors.
pub(crate) fn fixed_parts(message: &str) -> Vec<String> {
    let mut text = message.replace('…', "\0");
    for number in 1..134 {
        text = text.replace(&std::io::Error::from_raw_os_error(number).to_string(), "\0");
    }
    let mut parts = String::new();
    let mut word = String::new();
    for c in text.chars().chain(['\0']) {
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
            continue;
        }
        parts += if PLACEHOLDERS.contains(&word.as_str()) { "\0" } else { &word };
        word.clear();
        parts.push(c);
    }
    let parts = parts
        .split('\0')
        .map(|part| part.trim_matches([' ', ':', ';', ',', '\'', '(', ')']).to_owned());
    parts.filter(|part| letters(part) > 3).collect()
}

pub(crate) fn letters(text: &str) -> usize {
    text.chars().filter(|c| c.is_alphabetic()).count()
}

/// Returns the parts of messages that the source does not contain.
fn wrong_messages(messages: &[String], source: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for message in messages {
        let parts = fixed_parts(message);
        let missing = parts.iter().filter(|part| !source.contains(*part));
        wrong.extend(missing.map(|part| format!("{message}: the source does not say {part:?}")));
        if parts.is_empty() {
            wrong.push(format!("{message}: could be anything"));
        }
    }
    wrong
}

#[test]
fn documented_messages_match_the_source() {
    let texts = sources(&Path::new(ROOT).join("src"));
    let source: String =
        texts.iter().flat_map(|text| literals(text)).map(|(_, literal)| literal + "\0").collect();
    let messages: Vec<String> =
        Page::all().iter().flat_map(|page| page.first_cells("message")).collect();
    assert!(messages.len() > 50, "{} messages", messages.len());
    let wrong = wrong_messages(&messages, &source);
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));

    let example = "open tap \0: \0; is another process using it?";
    let made_up = ["open tap NAME: ERROR; is somebody using it?".to_owned(), "N NAME ERROR".into()];
    assert_eq!(wrong_messages(&made_up, example).len(), 2);
    let known =
        ["open tap NAME: Device or resource busy (os error 16); is another process using it?"];
    assert_eq!(wrong_messages(&known.map(str::to_owned), example), Vec::<String>::new());

    // Each warning and error of the source is documented.
    let page = Page::read("docs/troubleshooting.md");
    let mut missing = Vec::new();
    for text in &texts {
        let all = literals(text);
        for call in ["warn!(", "error!(", "StartError::new(", "OpenError(format!("] {
            for (place, _) in text.match_indices(call) {
                let end = text[place..].find(';').map_or(text.len(), |length| place + length);
                let said = all.iter().find(|(start, _)| (place..end).contains(start));
                let parts = said.iter().flat_map(|(_, said)| said.split('\0')).map(str::trim);
                let Some(part) = parts.max_by_key(|part| letters(part)) else { continue };
                let part = part.trim_matches([':', ';', ' ']);
                if letters(part) > 3 && !page.text.contains(part) {
                    missing.push(part.to_owned());
                }
            }
        }
    }
    assert!(missing.is_empty(), "docs/troubleshooting.md lacks:\n{}", missing.join("\n"));
}

/// Returns each promise with its page: the numbered items of the threat model's section that names tests,
/// and the cells of the columns `shown by` of docs/survival.md.
fn promises() -> Vec<(String, String)> {
    let threats = Page::read("docs/threat-model.md").text;
    let section = threats.split("\n## ").find(|section| section.contains("Shown by")).unwrap();
    let mut promises: Vec<(String, String)> = Vec::new();
    for line in section.lines() {
        if line.starts_with(|first: char| first.is_ascii_digit()) {
            promises.push(("docs/threat-model.md".into(), String::new()));
        }
        if let Some((_, promise)) = promises.last_mut() {
            *promise += line.trim();
            promise.push(' ');
        }
    }
    assert!(promises.len() >= 6);
    let shown = Page::read("docs/survival.md").column("shown by");
    promises.extend(shown.into_iter().map(|cell| ("docs/survival.md".into(), cell)));
    assert!(promises.len() >= 15);
    promises
}

/// Returns complaints about the tests that a promise names: a case by its number after `cases`, or a test
/// by its path.
fn wrong_tests(promise: &str, sources: &[(String, String)]) -> Vec<String> {
    let is_test = |path: &str, name: &str| {
        sources.iter().any(|(module, source)| {
            module.ends_with(path) && source.contains(&format!("\nfn {name}("))
        })
    };
    let (mut named, mut wrong) = (0, Vec::new());
    let shown = promise.rsplit_once("Shown by").map_or(promise, |(_, shown)| shown);
    for word in shown.split('`').skip(1).step_by(2) {
        if let Some((path, name)) = word.rsplit_once("::") {
            named += 1;
            if !is_test(path, name) {
                wrong.push(format!("there is no test {word}"));
            }
        }
    }
    if let Some((_, cases)) = shown.split_once("cases ") {
        let numbers = cases.split(|it: char| !it.is_ascii_digit()).filter_map(|it| it.parse().ok());
        for case in numbers.collect::<Vec<u8>>() {
            named += 1;
            let shown =
                [format!("fn hostile_{case:02}_"), format!("({case})"), format!("note({case},")];
            let is_shown = |source: &String| shown.iter().any(|it| source.contains(it));
            if !sources.iter().any(|(_, source)| is_shown(source)) {
                wrong.push(format!("there is no hostile case {case}"));
            }
        }
    }
    if named == 0 {
        wrong.push("names no test".into());
    }
    wrong
}

#[test]
fn promises_name_existing_tests() {
    let mut sources = Vec::new();
    let tests = Path::new(ROOT).join("tests");
    for directory in [tests.clone(), tests.join("hostile")] {
        for file in fs::read_dir(&directory).unwrap().map(|file| file.unwrap().path()) {
            if file.extension().is_some_and(|it| it == "rs") {
                let module = file.strip_prefix(&tests).unwrap().with_extension("");
                let module = module.to_str().unwrap().replace('/', "::");
                sources.push((module, fs::read_to_string(&file).unwrap()));
            }
        }
    }
    let complaints: Vec<String> = promises()
        .iter()
        .flat_map(|(page, promise)| {
            let wrong = wrong_tests(promise, &sources);
            wrong.into_iter().map(move |what| format!("{page}: {what}: {promise:.60}"))
        })
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    // The check finds mistakes.
    for (promise, complaint) in [
        ("1. Nothing.", "names no test"),
        ("1. Shown by cases 10 and 199.", "no hostile case 199"),
        ("1. Shown by `takeover::nothing`.", "no test takeover::nothing"),
    ] {
        let found = wrong_tests(promise, &sources);
        assert!(found.len() == 1 && found[0].contains(complaint), "{promise}: {found:?}");
    }
}

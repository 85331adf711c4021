//! Imports point down: a module uses only modules on floors below its own. docs/architecture.md has the
//! table of floors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The floor of each module.
type Floors = BTreeMap<String, u32>;

/// Reads the table whose first head is `floor`: floors in its first column, modules in its second.
fn floors(page: &str) -> Floors {
    let rows = page.lines().skip_while(|line| !line.starts_with("| floor |"));
    let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
    let mut floors = Floors::new();
    for row in rows {
        let mut cells = row.trim_matches('|').split('|').map(str::trim);
        let floor = cells.next().and_then(|cell| cell.parse().ok());
        let floor = floor.unwrap_or_else(|| panic!("no number in the first column: {row}"));
        for module in cells.next().unwrap_or_default().split('`').skip(1).step_by(2) {
            assert_eq!(floors.insert(module.to_owned(), floor), None, "{module} is there twice");
        }
    }
    floors
}

/// Returns the length of a string literal at the start of `text`, if there is one.
fn string(text: &str) -> Option<usize> {
    let prefix = ["br", "cr", "b", "c", "r", ""].into_iter().find(|it| text.starts_with(it))?;
    let after = &text[prefix.len()..];
    if prefix.ends_with('r') {
        let hashes = after.len() - after.trim_start_matches('#').len();
        let content = after[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let length = content.find(&end).map_or(content.len(), |place| place + end.len());
        return Some(prefix.len() + hashes + 1 + length);
    }
    let mut chars = after.strip_prefix('"')?.char_indices();
    while let Some((place, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '"' => return Some(prefix.len() + 1 + place + 1),
            _ => {}
        }
    }
    Some(text.len())
}

/// Returns the length of a comment at the start of `text`, if there is one. Block comments may be nested.
fn comment(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    let mut place = text.starts_with("/*").then_some(2)?;
    let mut depth = 1;
    while depth > 0 {
        let rest = &text[place..];
        match (rest.find("/*"), rest.find("*/")) {
            (Some(open), Some(close)) if open < close => {
                (place, depth) = (place + open + 2, depth + 1)
            }
            (_, Some(close)) => (place, depth) = (place + close + 2, depth - 1),
            (_, None) => return Some(text.len()),
        }
    }
    Some(place)
}

/// Returns the length of a character or a lifetime at the start of `text`, if there is one.
fn quoted(text: &str) -> Option<usize> {
    let after = text.strip_prefix('\'')?;
    let first = after.chars().next()?;
    if first == '\\' {
        return Some(2 + first.len_utf8() + after[2..].find('\'')? + 1);
    }
    let is_char = after[first.len_utf8()..].starts_with('\'');
    Some(1 + if is_char { first.len_utf8() + 1 } else { 0 })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Splits source into words, `::` and other characters, each with its line. Comments, strings and
/// characters are left out.
fn tokens(text: &str) -> Vec<(usize, &str)> {
    let (mut tokens, mut rest, mut line) = (Vec::new(), text, 1);
    while let Some(first) = rest.chars().next() {
        let skipped = comment(rest).or_else(|| string(rest)).or_else(|| quoted(rest));
        let length = skipped.unwrap_or_else(|| match first {
            _ if is_word(first) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            _ => first.len_utf8(),
        });
        let (token, after) = rest.split_at(length);
        if skipped.is_none() && !first.is_whitespace() {
            tokens.push((line, token));
        }
        line += token.matches('\n').count();
        rest = after;
    }
    tokens
}

/// Returns the first names of the path, or of the group of paths, that `tokens` begin with.
fn names<'a>(tokens: &[(usize, &'a str)]) -> Vec<(usize, &'a str)> {
    let mut names = Vec::new();
    let (mut depth, mut begins) = (0, true);
    for &(line, token) in tokens {
        match token {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => begins = depth == 1,
            _ => {
                if std::mem::take(&mut begins) && token.starts_with(is_word) && token != "self" {
                    names.push((line, token));
                }
            }
        }
        if depth == 0 {
            break;
        }
    }
    names
}

/// Returns the modules that a file of src uses, each with the line: those after `crate::`, after
/// `vhost_user_net::` in the program, and after as many `super::` as lead out of the file's module.
fn uses<'a>(file: &Path, text: &'a str) -> Vec<(usize, &'a str)> {
    let tokens = tokens(text);
    let words: Vec<&str> = tokens.iter().map(|(_, token)| *token).collect();
    let depth = file.components().count();
    let (mut uses, mut braces, mut modules) = (Vec::new(), 0, Vec::new());
    for place in 0..tokens.len() {
        match words[place..] {
            ["mod", _, "{", ..] => modules.push(braces),
            ["{", ..] => braces += 1,
            ["}", ..] => {
                braces -= 1;
                modules.pop_if(|it| *it == braces);
            }
            ["crate" | "vhost_user_net", "::", ..] => uses.extend(names(&tokens[place + 2..])),
            ["super", "::", ..] if place == 0 || words[place - 1] != "::" => {
                let steps =
                    words[place..].chunks(2).take_while(|it| *it == ["super", "::"]).count();
                if steps == depth + modules.len() {
                    uses.extend(names(&tokens[place + 2 * steps..]));
                }
            }
            _ => {}
        }
    }
    uses
}

/// Returns the complaints about a file of src, whose path is relative to src.
fn wrong_uses(floors: &Floors, file: &Path, text: &str) -> Vec<String> {
    let module = file.iter().next().and_then(|name| name.to_str()).unwrap_or_default();
    let module = module.trim_end_matches(".rs");
    let shown = |module: &str| {
        floors.get(module).map_or("no floor".into(), |floor| format!("floor {floor}"))
    };
    let used = uses(file, text).into_iter().filter(|(_, used)| *used != module);
    let wrong = used.filter(|(_, used)| match (floors.get(module), floors.get(*used)) {
        (Some(from), Some(to)) => from <= to,
        _ => true,
    });
    wrong
        .map(|(line, used)| {
            let (from, to) = (shown(module), shown(used));
            format!("src/{}:{line}: {module} ({from}) uses {used} ({to})", file.display())
        })
        .collect()
}

/// Returns all source files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|it| it == "rs"))
        .collect();
    files.sort();
    files
}

/// Returns the modules that src/lib.rs declares.
fn modules(lib: &str) -> Vec<&str> {
    let declared = lib.lines().map(|line| line.trim_start_matches("pub "));
    declared.filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect()
}

/// Returns the declared modules without a floor, and the modules with a floor that are not declared. The
/// program itself, `main`, is declared nowhere.
fn differences<'a>(floors: &'a Floors, declared: &[&'a str]) -> (Vec<&'a str>, Vec<&'a str>) {
    let without = declared.iter().copied().filter(|module| !floors.contains_key(*module));
    let names = floors.keys().map(String::as_str);
    let gone = names.filter(|name| *name != "main" && !declared.contains(name));
    (without.collect(), gone.collect())
}

#[test]
fn imports_point_down() {
    let source = Path::new(ROOT).join("src");
    let floors = floors(&fs::read_to_string(Path::new(ROOT).join("docs/architecture.md")).unwrap());
    let lib = fs::read_to_string(source.join("lib.rs")).unwrap();
    let (without, gone) = differences(&floors, &modules(&lib));
    let mut wrong: Vec<String> =
        without.iter().map(|it| format!("docs/architecture.md: {it} has no floor")).collect();
    wrong.extend(gone.iter().map(|it| format!("docs/architecture.md: there is no module {it}")));
    let mut count = 0;
    // src/lib.rs only declares modules.
    for path in files(&source).iter().filter(|path| !path.ends_with("src/lib.rs")) {
        let (file, text) = (path.strip_prefix(&source).unwrap(), fs::read_to_string(path).unwrap());
        count += uses(file, &text).len();
        wrong.extend(wrong_uses(&floors, file, &text));
    }
    assert!(count > 500, "only {count} uses were found");
    assert!(wrong.is_empty(), "{} complaints:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn upward_imports_are_found() {
    let floors = floors(
        "| room | knows |\n|---|---|\n| `cellar` | `wine` |\n\n\
         | floor | modules | what |\n|---|---|---|\n\
         | 2 | `roof` | `tiles` |\n| 1 | `flat`, `shop` | |\n| 0 | `cellar` | |\n\ntext\n",
    );
    assert_eq!(floors.keys().collect::<Vec<_>>(), ["cellar", "flat", "roof", "shop"]);
    let found = |file: &str, text: &str| wrong_uses(&floors, Path::new(file), text);
    let allowed = r##"
        //! See [`roof`](crate::roof).
        use crate::cellar::{self, roof};
        use crate::flat::window;
        use super::door; /* crate::roof /* nested */ crate::shop */
        const TEXT: &str = "crate::roof \" crate::roof";
        const RAW: &str = r#"crate::roof " crate::roof"#;
        fn light<'a>(quote: &'a str) -> char { if quote.is_empty() { '"' } else { '\'' } }
        mod tests { use super::super::stairs; use super::*; }
    "##;
    assert_eq!(found("flat/room.rs", allowed), Vec::<String>::new());
    let complaint = "src/flat/room.rs:2: flat (floor 1) uses roof (floor 2)";
    for text in [
        "\nuse crate::roof::tile;",
        "use crate::{cellar::{self, wine},\n roof};",
        "use crate::{\nroof::{tile, ridge}, cellar};",
        "fn f() { 'a'; \"\\\"\"\n; crate::roof::tile(); }",
        "\n#[cfg(test)] mod tests { use crate :: roof; }",
        "use super::super::cellar;\nuse super::super::roof;",
        "mod tests {\nuse super::super::super::{cellar, roof}; }",
    ] {
        assert_eq!(found("flat/room.rs", text), [complaint], "{text}");
    }
    let same = "src/flat.rs:1: flat (floor 1) uses shop (floor 1)";
    assert_eq!(found("flat.rs", "use super::shop;"), [same]);
    let unknown = "src/flat.rs:1: flat (floor 1) uses attic (no floor)";
    assert_eq!(found("flat.rs", "use crate::attic;"), [unknown]);
    let program = "src/main.rs:1: main (no floor) uses roof (floor 2)";
    assert_eq!(found("main.rs", "use vhost_user_net::roof;"), [program]);
    let declared = modules("pub mod roof;\n#[cfg(x)]\nmod attic;\nmod shop;\nmod a {}");
    assert_eq!(declared, ["roof", "attic", "shop"]);
    assert_eq!(differences(&floors, &declared), (vec!["attic"], vec!["cellar", "flat"]));
}

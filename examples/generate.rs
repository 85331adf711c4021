//! Makes what a package ships of the command line's description: manual pages in DIRECTORY/man,
//! completions in DIRECTORY/completions. `cargo run --example generate -- DIRECTORY`

use std::fs;
use std::io;
use std::path::Path;

use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use vhost_user_net::config;

fn main() -> io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1) else {
        return Err(io::Error::other("name the directory to write to"));
    };
    let man = Path::new(&directory).join("man");
    fs::create_dir_all(&man)?;
    let mut command = config::command().disable_help_subcommand(true);
    command.build();
    pages(&command, &man)?;

    let completions = Path::new(&directory).join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let file = generate_to(shell, &mut config::command(), "vhost-user-net", &completions)?;
        if shell == Shell::Bash {
            // clap_complete 4.6 writes a program's dashes in two ways, so that no subcommand is found.
            let text = fs::read_to_string(&file)?;
            fs::write(file, text.replace("vhost__subcmd__user__subcmd__net", "vhost__user__net"))?;
        }
    }
    Ok(())
}

/// A page for a command, and for each below it.
fn pages(command: &clap::Command, directory: &Path) -> io::Result<()> {
    // Short: it stands between the page's name and its name again.
    let page = Man::new(command.clone()).manual("vhost-user");
    // An empty date would be left out, and what stands behind it would take its place.
    let page = page.date(" ").source(concat!("vhost-user-net ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    page.render(&mut text)?;
    // Some words are nearly as long as a line, so that lines can't all end at the right.
    let text = String::from_utf8_lossy(&text).replacen(".SH NAME", ".ad l\n.SH NAME", 1);
    fs::write(directory.join(page.get_filename()), text)?;
    command.get_subcommands().try_for_each(|command| pages(command, directory))
}

//! Puts faults into a copy of the code, one at a time, and sees that a test fails for each: `make mutants`.
//!
//! A fault that no test notices ends it with an error. The list is mutants.toml.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Debug, Deserialize)]
struct Mutant {
    what: String,
    file: PathBuf,
    from: String,
    to: String,
    test: String,
}

/// The copy that is broken, and where it is built.
struct Copy {
    tree: PathBuf,
    build: PathBuf,
}

impl Copy {
    /// Copies what git knows of the project, as it is now.
    fn new(root: &Path) -> Self {
        let tree = root.join("target/mutants/tree");
        fs::create_dir_all(&tree).expect("target/ can be written to");
        let script = "git ls-files -z | xargs -0 cp --parents -t \"$0\"";
        let copied = Command::new("sh").args(["-c", script]).arg(&tree).current_dir(root).status();
        assert!(copied.expect("sh runs").success(), "the project cannot be copied");
        Self { tree, build: root.join("target/mutants/build") }
    }

    fn cargo(&self, words: &[&str]) -> Output {
        let mut command = Command::new("cargo");
        command.args(words).current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.build);
        command.env("WEFT_BIN_DIR", self.build.join("debug")).env("WEFT_SEED", "1").env_remove("RUSTFLAGS");
        command.output().expect("cargo runs")
    }

    /// Runs the test of a fault; true if it failed, as it must.
    fn catches(&self, mutant: &Mutant) -> bool {
        let path = self.tree.join(&mutant.file);
        let whole = fs::read_to_string(&path).expect("the file of a mutant exists");
        fs::write(&path, whole.replacen(&mutant.from, &mutant.to, 1)).expect("the copy can be written to");
        let built = self.cargo(&["build", "--locked", "--workspace", "--bins"]);
        let words: Vec<&str> = mutant.test.split(' ').collect();
        let built_test = self.cargo(&[&["test", "--locked", "--no-run"], &words[..]].concat());
        for output in [&built, &built_test] {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "the fault \"{}\" does not compile:\n{said}", mutant.what);
        }
        let tested = self.cargo(&[&["test", "--locked"], &words[..]].concat());
        fs::write(&path, whole).expect("the copy can be written to");
        !tested.status.success()
    }
}

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is below the root").to_owned();
    let list: List = toml::from_str(include_str!("mutants.toml")).expect("mutants.toml is a list of mutants");
    let only = std::env::var("MUTANT").unwrap_or_default();
    let copy = Copy::new(&root);
    let mut missed = 0;
    for mutant in list.mutant.iter().filter(|mutant| mutant.what.contains(&only)) {
        let caught = copy.catches(mutant);
        missed += u32::from(!caught);
        println!("{}: {} ({})", if caught { "caught" } else { "MISSED" }, mutant.what, mutant.test);
    }
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

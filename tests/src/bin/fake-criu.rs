//! A fake CRIU in a process of its own; see `e2e_tests::fake::job`.

fn main() {
    std::process::exit(e2e_tests::fake::job::main());
}

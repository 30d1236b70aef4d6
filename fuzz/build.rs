//! The requests of a hostile guest are C, as the lab's guest is.

fn main() {
    cc::Build::new().file("requests.c").compile("requests");
    println!("cargo:rerun-if-changed=requests.c");
    println!("cargo:rerun-if-changed=../tests/hostile/requests.h");
}

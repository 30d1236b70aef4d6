# Makes of include/privmem.h what doxygen reads: puts each declaration into a
# topic of topics.dox, and says in doxygen's words what the comments say in
# Rust's. Names in backticks become references, so that doxygen warns of those
# that do not exist.

function topic(name) {
    if (name ~ /_(version|last_error)$/) return "errors"
    if (name ~ /agent$/) return "agents"
    if (name ~ /listener$/) return "listeners"
    if (name ~ /_(un)?bind(ing)?$/) return "bindings"
    if (name ~ /_(convert|memory_fault)$/) return "conversions"
    if (name ~ /^privmem_conversion/) return "conversions"
    if (name ~ /_(failure|memory_failure)$/) return "failures"
    if (name ~ /_relocate$/) return "relocation"
    if (name ~ /_(info|run|next_run|picture|host_access|UNKNOWN)$/) return "inspection"
    if (name ~ /_(failed_conversion|MESSAGE_SIZE)$/) return "inspection"
    if (name ~ /_(save_state|load_state|reset)$/) return "machine"
    if (name ~ /_(prepare|populate|finalize|page_type|set_start|set_finish|set_tdx_vcpu)$/) return "launch"
    if (name ~ /^privmem_vm/) return "vms"
    return "regions"
}

function references(line,    name) {
    while (match(line, /`((struct|enum) )?privmem_[a-z0-9_]+`/)) {
        name = substr(line, RSTART + 1, RLENGTH - 2)
        sub(/privmem_/, "@ref &", name)
        line = substr(line, 1, RSTART - 1) name substr(line, RSTART + RLENGTH)
    }
    return line
}

# The file's own comment: its conventions become a list. What is meant for
# readers of the file stays away.
NR == 1 { print "/**\n * @file"; at_top = 1; next }
at_top {
    if (/^ \*\/$/) at_top = 0
    if (/Generated from|SPDX/) next
    sub(/^ \* Conventions$/, " * @par Conventions")
    if (sub(/^ \*   [A-Z][a-z]+/, "&**:")) sub(/^ \*   /, " * - **")
    sub(/^ \*    +/, " *   ")
    print
    next
}

# A declaration's comment, held back until its name is known.
/^\/\*\*$/ { comment = $0; next }
comment && /^ \*\/$/ { ended = 1; next }
comment && !ended {
    sub(/^ \* # Safety$/, " * @pre")
    sub(/^ \* Errors: /, " * @par Errors\n * ")
    comment = comment "\n" references($0)
    next
}
ended {
    name = $0
    sub(/^#define /, "", name)
    sub(/( \{|;|\(| [A-Z]).*/, "", name)
    sub(/.*[ *]/, "", name)
    print comment "\n * @ingroup " topic(name) "\n */"
    comment = ended = ""
    # Doxygen passes over a struct that is only declared.
    if (/^struct [a-z_]+;$/) sub(/;$/, " {};")
}
{ print references($0) }

//! `nftables-*.img`: the rules of a network namespace, as `nft list ruleset` prints them.
//!
//! CRIU locks the namespace before it writes them, so the image has CRIU's own rules also where the
//! process has none. `criu restore` makes the lock anew, and takes it away at its end.

/// Tables of CRIU's lock by nftables (`nftables_get_table` in `netfilter.c`).
const LOCK_TABLE: &str = "table inet CRIU-";

/// The chains that iptables has in its table `filter`, and makes again when it needs them.
const BUILTIN: [&str; 3] = ["chain INPUT {", "chain FORWARD {", "chain OUTPUT {"];

/// CRIU's lock by iptables-nft (`iptables_network_lock_internal` in `net.c`), without counters.
const LOCK_CHAIN: &str = "chain CRIU {";
const LOCK_JUMP: &str = "jump CRIU";
const LOCK_RULES: [&str; 2] = ["meta mark 0x0000c114 accept", "drop"];

/// Whether a ruleset has anything but CRIU's lock. What is not known counts as a rule.
pub fn has_rules(ruleset: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(ruleset) else {
        return true;
    };
    let mut place = Place::Top;
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        place = match place.after(line) {
            Some(place) => place,
            None => return true,
        };
    }
    !matches!(place, Place::Top)
}

/// Where a line stands.
#[derive(Clone, Copy)]
enum Place {
    Top,
    /// In a table of CRIU's, this deep.
    Lock(u32),
    /// In iptables' table `filter`.
    Filter,
    /// In a chain that iptables makes.
    Builtin,
    /// In the chain of CRIU's lock.
    LockChain,
}

impl Place {
    /// Where the next line stands; `None` behind one that is the process's.
    fn after(self, line: &str) -> Option<Self> {
        match self {
            Self::Top if line.starts_with(LOCK_TABLE) && line.ends_with('{') => Some(Self::Lock(1)),
            Self::Top => {
                matches!(line, "table ip filter {" | "table ip6 filter {").then_some(Self::Filter)
            }
            Self::Lock(depth) => {
                let opened = line.ends_with('{');
                let depth = match (opened, line == "}") {
                    (true, _) => depth.checked_add(1)?,
                    (_, true) => depth - 1,
                    _ => depth,
                };
                Some(match depth {
                    0 => Self::Top,
                    depth => Self::Lock(depth),
                })
            }
            Self::Filter if line == "}" => Some(Self::Top),
            Self::Filter if line == LOCK_CHAIN => Some(Self::LockChain),
            Self::Filter => BUILTIN.contains(&line).then_some(Self::Builtin),
            Self::Builtin | Self::LockChain if line == "}" => Some(Self::Filter),
            Self::Builtin => {
                let base =
                    line.starts_with("type filter hook ") && line.ends_with("policy accept;");
                (base || without_counter(line) == LOCK_JUMP).then_some(self)
            }
            Self::LockChain => LOCK_RULES
                .contains(&without_counter(line).as_str())
                .then_some(self),
        }
    }
}

/// A rule without `counter packets N bytes N`.
fn without_counter(rule: &str) -> String {
    let words: Vec<&str> = rule.split_ascii_whitespace().collect();
    let at = words.iter().position(|&word| word == "counter");
    let kept = match at {
        Some(at) if matches!(words[at..], ["counter", "packets", _, "bytes", _, ..]) => {
            [&words[..at], &words[at + 5..]].concat()
        }
        _ => words,
    };
    kept.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // All of them from CRIU 4.1.1 of Debian 13, whose iptables is iptables-nft.

    const LOCK: &str = "table ip filter {
	chain CRIU {
		meta mark 0x0000c114 counter packets 0 bytes 0 accept
		counter packets 12 bytes 720 drop
	}

	chain INPUT {
		type filter hook input priority filter; policy accept;
		counter packets 0 bytes 0 jump CRIU
	}

	chain OUTPUT {
		type filter hook output priority filter; policy accept;
		counter packets 0 bytes 0 jump CRIU
	}
}
";

    #[test]
    fn a_namespace_without_rules_has_none() {
        assert!(!has_rules(b""), "--network-lock skip");
        assert!(!has_rules(LOCK.as_bytes()));
        let both = format!("{LOCK}{}", LOCK.replace("ip filter", "ip6 filter"));
        assert!(!has_rules(both.as_bytes()));
        let by_nftables = "table inet CRIU-6a4b3d50-ff19-4f9c-83 {
	chain output {
		type filter hook output priority filter; policy drop;
		meta mark 0x0000c114 accept
	}

	chain input {
		type filter hook input priority filter; policy drop;
		meta mark 0x0000c114 accept
	}
}
";
        assert!(!has_rules(by_nftables.as_bytes()));
        let after_a_flush = "# Warning: table ip filter is managed by iptables-nft, do not touch!
table ip filter {
	chain INPUT {
		type filter hook input priority filter; policy accept;
	}
}
";
        assert!(!has_rules(after_a_flush.as_bytes()));
    }

    #[test]
    fn rules_beside_the_lock_are_seen() {
        let rule = "		tcp dport 4242 counter packets 0 bytes 0 drop\n";
        let jump = "		counter packets 0 bytes 0 jump CRIU\n";
        let by_iptables = LOCK.replacen(jump, &format!("{jump}{rule}"), 1);
        assert!(has_rules(by_iptables.as_bytes()));
        assert!(has_rules(
            LOCK.replace("policy accept", "policy drop").as_bytes()
        ));
        assert!(has_rules(LOCK.replace("c114", "c115").as_bytes()));
        assert!(has_rules(
            format!("{LOCK}table inet own {{\n}}\n").as_bytes()
        ));
        let own = "table inet own {
	chain c {
		type filter hook input priority filter; policy accept;
		tcp dport 4242 drop
	}
}
";
        assert!(has_rules(own.as_bytes()));
        assert!(has_rules(b"table inet CRIU-1 {\n"), "cut off");
        assert!(has_rules(b"\xff"));
    }

    proptest! {
        #[test]
        fn no_text_panics(lines in prop::collection::vec("(table inet CRIU-1 \\{|\\}|\\{|counter packets|chain CRIU \\{|table ip filter \\{|.*)", 0..20)) {
            let _ = has_rules(lines.join("\n").as_bytes());
        }
    }
}

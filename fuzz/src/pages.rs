//! CRIUs that send pages to a page server: rounds of requests in either layout, a little wrong now
//! and then, on several connections at once.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::BytesMut;
use image_common::criu::page_server::{Layout, Request};

use crate::client::Client;
use crate::input::Input;
use crate::link::{entry, pagemap_id};
use crate::world;

/// In one input. Each may cost a session with a link of its own, and a few show all that many do.
const MOST: usize = 12;

#[derive(Default)]
pub struct Senders {
    clients: Vec<(Client, Layout)>,
    opened: usize,
}

impl Senders {
    /// One thing, as the bytes have it.
    pub async fn step(&mut self, input: &mut Input<'_>, connect: &dyn Fn(u8) -> UnixStream) {
        let op = input.u8();
        let at = usize::from(input.u8());
        if (self.clients.is_empty() || op % 16 == 0) && self.opened < MOST {
            self.opened += 1;
            if self.clients.len() > 3 {
                self.clients.remove(0);
            }
            let layout = match op & 16 {
                0 => Layout::Bytes24,
                _ => Layout::Bytes32,
            };
            let host = 1 + op / 128;
            self.clients.push((Client::new(connect(host)), layout));
        }
        if self.clients.is_empty() {
            return;
        }
        let at = at % self.clients.len();
        let (client, layout) = &mut self.clients[at];
        let id = pagemap_id(input);
        let request = match op % 16 {
            0..=2 => Request::Open { id, answer: true },
            3 => Request::Open { id, answer: false },
            4 => Request::Parent(id),
            5..=8 => Request::Add {
                id,
                entry: entry(input),
            },
            9 => Request::Close,
            10 => Request::Get {
                pid: 7,
                vaddr: 0,
                pages: 1,
            },
            11 => return client.say(input.short()).await,
            12 => return drop(self.clients.remove(at)),
            13 => {
                let _ = client.socket.shutdown(std::net::Shutdown::Write);
                return;
            }
            14 => return world::pass(Duration::from_millis(u64::from(input.u8()) * 10)).await,
            _ => {
                world::turn().await;
                client.hear();
                return;
            }
        };
        let mut out = BytesMut::new();
        request.encode(*layout, &mut out);
        if let Request::Add { entry, .. } = request {
            let whole = entry.is_present() && (1..100).contains(&entry.pages);
            if whole && input.u8() < 250 {
                let bytes = usize::try_from(entry.pages).expect("few") << 12;
                out.resize(out.len() + bytes, op);
            }
        }
        client.say(&out).await;
    }

    /// Bytes, and the one who says them stays for an answer.
    pub async fn raw(&mut self, input: &mut Input<'_>, socket: UnixStream) {
        let piece = *input.pick(&[usize::MAX, 1, 24, 4096]);
        let mut client = Client::new(socket);
        while !input.is_empty() && !client.over {
            client.say(input.bytes(piece)).await;
            world::turn().await;
            client.hear();
        }
        self.clients.push((client, Layout::Bytes24));
    }
}

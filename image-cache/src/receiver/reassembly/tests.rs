use super::*;
use crate::store::image::Next;
use crate::store::memory::budget::Budget;
use crate::store::set::{Lookup, SET_BYTES};
use crate::store::Store;
use image_common::criu::dialect::Dialect;
use image_common::net::DEAD_PEER;
use proptest::prelude::*;

const STREAM: StreamNumber = StreamNumber(7);

/// A set with one image on its way, over so many connections.
struct Lab {
    arrivals: Reassembly,
    set: Arc<Set>,
    budget: Arc<Budget>,
}

fn name() -> ImageName {
    ImageName::new("pages-1.img").unwrap()
}

impl Lab {
    fn new(connections: usize) -> Self {
        let store = Store::new(1 << 30, crate::store::Policy::default());
        let session = store
            .open_session("web".parse().unwrap(), 1, "peer".to_owned())
            .unwrap();
        let snapshot = "1".parse().unwrap();
        let set = session
            .open_set(SetNumber(1), snapshot, None, false, Dialect::Stream)
            .unwrap();
        let lab = Self {
            arrivals: Reassembly::new(connections, DEAD_PEER),
            set,
            budget: store.budget.clone(),
        };
        lab.open(STREAM, &name());
        lab
    }

    fn open(&self, stream: StreamNumber, name: &ImageName) {
        let writer = self
            .set
            .open_image(name, None, false, &self.budget)
            .unwrap();
        self.arrivals.open(stream, self.set.clone(), Some(writer));
    }

    fn begin(
        &self,
        connection: usize,
        sequence: u32,
        length: usize,
    ) -> Result<Begun, ReassemblyError> {
        let begun = self
            .arrivals
            .try_begin(STREAM, connection, sequence, length)?;
        Ok(begun.expect("nothing to wait for"))
    }

    fn frame(&self, connection: usize, sequence: u32, length: usize) -> Frame {
        match self.begin(connection, sequence, length) {
            Ok(Begun::Receive(frame)) => frame,
            Ok(_) => panic!("not to be received"),
            Err(e) => panic!("{e}"),
        }
    }

    /// A whole frame at once.
    fn receive(
        &self,
        connection: usize,
        sequence: u32,
        bytes: &[u8],
    ) -> Result<Option<Whole>, ReassemblyError> {
        match self.begin(connection, sequence, bytes.len())? {
            Begun::Receive(mut frame) => {
                fill(&mut frame, bytes);
                self.arrivals.done(frame)
            }
            Begun::Forget | Begun::Refused(_) => Ok(None),
        }
    }

    fn stored(&self, name: &ImageName) -> Option<Vec<u8>> {
        match self.set.lookup(name, None) {
            Lookup::Ready(image) if image.is_complete() => Some(image.head(usize::MAX)),
            _ => None,
        }
    }

    /// Besides the set itself, whose name has one byte.
    fn used(&self) -> u64 {
        self.budget.used() - SET_BYTES - 1
    }

    fn held(&self) -> usize {
        self.arrivals.state().held
    }
}

/// Receives a part of a frame.
fn fill(frame: &mut Frame, mut bytes: &[u8]) {
    if frame.is_small() {
        frame.put_small(bytes).unwrap();
        return;
    }
    while !bytes.is_empty() {
        let spare = frame.spare(bytes.len()).unwrap();
        let n = spare.len().min(5000);
        spare[..n].copy_from_slice(&bytes[..n]);
        frame.filled(n);
        bytes = &bytes[n..];
    }
}

/// What a connection does next in the model: begins its next frame, or ends the one it has.
#[derive(Debug, Clone)]
struct Plan {
    /// Lengths of the frames, and the connection of each.
    frames: Vec<(usize, usize)>,
    /// Which connection moves next.
    turns: Vec<usize>,
    /// IMAGE_END comes after so many moves.
    end_at: usize,
    connections: usize,
}

fn plan() -> impl Strategy<Value = Plan> {
    (2..6usize).prop_flat_map(|connections| {
        // Some too long for the segment that small images share.
        let length = prop_oneof![8 => 1..300usize, 1 => 66_000..70_000usize];
        let frames = proptest::collection::vec((length, 0..connections), 1..25);
        let turns = proptest::collection::vec(0..connections, 0..80);
        (frames, turns, 0..60usize).prop_map(move |(frames, turns, end_at)| Plan {
            frames,
            turns,
            end_at,
            connections,
        })
    })
}

/// A frame of recognisable bytes.
fn bytes_of(sequence: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i * 7 + sequence * 31) % 251).unwrap())
        .collect()
}

/// Carries the plan out; the frame at `change.0` is left out, or sent a second time. Gives the
/// image, and how many times it was said to be whole.
fn carry_out(
    plan: &Plan,
    change: Option<(usize, bool)>,
) -> Result<(Option<Vec<u8>>, usize), ReassemblyError> {
    let lab = Lab::new(plan.connections);
    let mut queues = vec![std::collections::VecDeque::new(); plan.connections];
    for (sequence, &(length, connection)) in plan.frames.iter().enumerate() {
        let times = match change {
            Some((at, twice)) if at == sequence => 2 * usize::from(twice),
            _ => 1,
        };
        for _ in 0..times {
            queues[connection].push_back((sequence, length));
        }
    }
    let total: u64 = plan.frames.iter().map(|f| f.0 as u64).sum();
    let mut receiving: Vec<Option<(Frame, Vec<u8>)>> = Vec::new();
    receiving.resize_with(plan.connections, || None);
    let mut whole = 0;
    // In the end every connection gets as many turns as it needs.
    let rest = (0..plan.connections).flat_map(|c| vec![c; 2 * plan.frames.len() + 4]);
    let turns = plan.turns.iter().copied().chain(rest);
    let mut ended = false;
    for (moves, connection) in turns.enumerate() {
        if moves == plan.end_at {
            ended = true;
            whole += usize::from(lab.arrivals.end(STREAM, total, None)?.is_some());
        }
        match receiving[connection].take() {
            Some((mut frame, bytes)) => {
                fill(&mut frame, &bytes);
                whole += usize::from(lab.arrivals.done(frame)?.is_some());
            }
            None => {
                let Some((sequence, length)) = queues[connection].pop_front() else {
                    continue;
                };
                let number = u32::try_from(sequence).unwrap();
                match lab.arrivals.try_begin(STREAM, connection, number, length)? {
                    Some(Begun::Receive(mut frame)) => {
                        let mut bytes = bytes_of(sequence, length);
                        if !frame.is_small() {
                            let rest = bytes.split_off(length / 3);
                            fill(&mut frame, &bytes);
                            bytes = rest;
                        }
                        receiving[connection] = Some((frame, bytes));
                    }
                    // Whole already: a frame more than there are, of a stream that is not there.
                    None => return Err(ReassemblyError::Unknown(STREAM)),
                    Some(_) => panic!("it is wanted, and there is memory"),
                }
            }
        }
    }
    if !ended {
        whole += usize::from(lab.arrivals.end(STREAM, total, None)?.is_some());
    }
    assert_eq!(
        lab.held(),
        lab.arrivals
            .state()
            .streams
            .values()
            .map(|a| a.early.len())
            .sum::<usize>()
    );
    Ok((lab.stored(&name()), whole))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_split_and_any_order_rebuild_the_image(plan in plan()) {
        let frames = plan.frames.iter().enumerate();
        let expected: Vec<u8> = frames.flat_map(|(i, f)| bytes_of(i, f.0)).collect();
        let (got, whole) = carry_out(&plan, None).unwrap();
        prop_assert_eq!(whole, 1);
        prop_assert!(got.unwrap() == expected);
    }

    #[test]
    fn a_frame_twice_is_an_error(plan in plan(), at in any::<prop::sample::Index>()) {
        let at = at.index(plan.frames.len());
        prop_assert!(carry_out(&plan, Some((at, true))).is_err());
    }

    #[test]
    fn a_frame_that_is_missing_is_never_made_up(plan in plan(), at in any::<prop::sample::Index>()) {
        let at = at.index(plan.frames.len());
        // Its bytes may still come as far as the cache knows, so this alone is no error.
        if let Ok((got, whole)) = carry_out(&plan, Some((at, false))) {
            prop_assert_eq!((got, whole), (None, 0));
        }
    }
}

#[test]
fn all_the_bytes_with_a_number_left_out_is_an_error() {
    let lab = Lab::new(2);
    lab.receive(0, 0, b"one").unwrap();
    lab.receive(1, 2, b"two").unwrap();
    let error = lab.arrivals.end(STREAM, 6, None).err().unwrap();
    assert!(
        matches!(error, ReassemblyError::Missing { sequence: 1, .. }),
        "{error}"
    );
}

#[test]
fn more_bytes_than_the_end_said_is_an_error() {
    let lab = Lab::new(2);
    lab.receive(0, 0, b"one").unwrap();
    assert!(lab.arrivals.end(STREAM, 4, None).unwrap().is_none());
    assert!(matches!(
        lab.begin(1, 1, 2),
        Err(ReassemblyError::Size { .. })
    ));
    assert!(matches!(
        lab.arrivals.end(STREAM, 4, None),
        Err(ReassemblyError::EndedTwice { .. })
    ));
    let lab = Lab::new(2);
    lab.receive(0, 0, b"one").unwrap();
    assert!(matches!(
        lab.arrivals.end(STREAM, 2, None),
        Err(ReassemblyError::Size { .. })
    ));
}

/// With one connection nothing comes late.
#[test]
fn one_connection_waits_for_nothing() {
    let lab = Lab::new(1);
    assert!(matches!(
        lab.begin(0, 1, 1),
        Err(ReassemblyError::Missing { sequence: 0, .. })
    ));
    lab.receive(0, 0, b"one").unwrap();
    assert!(matches!(
        lab.begin(0, 0, 1),
        Err(ReassemblyError::Repeated { .. })
    ));
    assert!(matches!(
        lab.arrivals.end(STREAM, 4, None),
        Err(ReassemblyError::Size { .. })
    ));
}

#[test]
fn numbers_wrap_around() {
    let lab = Lab::new(2);
    lab.arrivals.state().streams.get_mut(&STREAM).unwrap().next = u32::MAX;
    lab.receive(1, 0, b"two").unwrap();
    lab.receive(0, u32::MAX, b"one").unwrap();
    assert!(matches!(
        lab.begin(0, u32::MAX, 1),
        Err(ReassemblyError::Repeated { .. })
    ));
    assert!(lab.arrivals.end(STREAM, 6, None).unwrap().is_some());
    assert_eq!(lab.stored(&name()).unwrap(), b"onetwo");
}

/// A restore that follows sees the bytes whose turn it is while their frame arrives.
#[tokio::test]
async fn the_frame_whose_turn_it_is_can_be_read_at_once() {
    let lab = Lab::new(2);
    let Lookup::Ready(image) = lab.set.lookup(&name(), None) else {
        panic!("pages can be followed")
    };
    let mut reader = image.read();
    lab.receive(1, 1, &[2; 100_000]).unwrap();
    let mut first = lab.frame(0, 0, 100_000);
    assert_eq!(image.size(), 0, "the second frame is early");
    fill(&mut first, &[1; 70_000]);
    match reader.next(9).await {
        Next::Pieces(pieces) => assert_eq!(pieces.iter().map(|p| p.len()).sum::<usize>(), 70_000),
        _ => panic!("there is something"),
    }
    fill(&mut first, &[1; 30_000]);
    lab.arrivals.done(first).unwrap();
    assert_eq!(image.size(), 200_000);
}

/// A set that is given up while its frames arrive on several connections.
#[test]
fn what_is_forgotten_is_read_to_its_end_and_gives_its_memory_back() {
    for end_first in [false, true] {
        let lab = Lab::new(3);
        let turn = lab.frame(0, 0, 100_000);
        let early = lab.frame(1, 2, 100_000);
        lab.receive(2, 3, &[0; 100_000]).unwrap();
        assert_eq!(lab.held(), 2);
        lab.arrivals.forget_set(SetNumber(1));
        lab.set.abort("enough").unwrap();
        assert_eq!(lab.held(), 0);
        if end_first {
            assert!(lab.arrivals.end(STREAM, 400_000, None).unwrap().is_none());
        }
        for frame in [early, turn] {
            assert!(lab.arrivals.done(frame).unwrap().is_none());
        }
        assert_eq!(lab.used(), 0, "nothing holds the image");
        assert!(matches!(lab.begin(1, 1, 100_000), Ok(Begun::Forget)));
        if !end_first {
            assert!(lab.arrivals.end(STREAM, 400_000, None).unwrap().is_none());
        }
        assert_eq!(lab.arrivals.len(), 0, "its last byte came");
        assert_eq!(lab.held(), 0);
    }
}

#[test]
fn an_aborted_image_is_forgotten() {
    let lab = Lab::new(2);
    lab.receive(1, 1, &[0; 100_000]).unwrap();
    assert_eq!(lab.arrivals.abort(STREAM).unwrap(), Some(name()));
    assert!(matches!(lab.begin(1, 0, 5), Ok(Begun::Forget)));
    assert_eq!((lab.held(), lab.used()), (0, 0));
    let lab = Lab::new(1);
    lab.arrivals.abort(STREAM).unwrap();
    assert!(matches!(
        lab.begin(0, 0, 5),
        Err(ReassemblyError::Unknown(STREAM))
    ));
}

#[test]
fn the_memory_limit_holds() {
    let lab = Lab::new(2);
    let room = usize::try_from(lab.budget.limit() - lab.budget.used()).unwrap();
    let listed = usize::try_from(PIECE_OVERHEAD_BYTES).unwrap();
    let room = room - FILLER_OVERHEAD_BYTES - listed;
    assert!(matches!(lab.begin(1, 1, room + 1), Ok(Begun::Refused(_))));
    assert!(matches!(lab.begin(1, 2, room), Ok(Begun::Receive(_))));
    assert!(matches!(lab.begin(0, 0, 1), Ok(Begun::Refused(_))));
}

#[test]
fn early_frames_are_bounded_and_the_next_one_always_passes() {
    let lab = Lab::new(2);
    lab.arrivals.state().held = MAX_HELD;
    assert!(lab.arrivals.try_begin(STREAM, 1, 1, 1).unwrap().is_none());
    lab.receive(0, 0, b"x").unwrap();
    lab.receive(1, 1, b"y").unwrap();
    lab.arrivals.state().held = 0;
    lab.receive(1, 3, b"y").unwrap();
    assert_eq!(lab.held(), 1);
}

#[tokio::test]
async fn data_wait_for_the_beginning_of_their_image() {
    let lab = Arc::new(Lab::new(2));
    let other = StreamNumber(8);
    assert!(matches!(
        lab.arrivals.begin(other, 0, 0, 1).await,
        Err(ReassemblyError::Unknown(_))
    ));
    let waiting = lab.clone();
    let waits = tokio::spawn(async move {
        let begun = waiting.arrivals.begin(other, 1, 0, 1).await;
        matches!(begun, Ok(Begun::Receive(_)))
    });
    tokio::task::yield_now().await;
    assert!(!waits.is_finished());
    lab.open(other, &ImageName::new("core-1.img").unwrap());
    assert!(waits.await.unwrap());
}

/// Nobody opens it and nothing else comes: the session ends. As long as something comes, it waits.
#[tokio::test(start_paused = true)]
async fn a_wait_ends_when_nothing_arrives() {
    let lab = Arc::new(Lab::new(2));
    let began = tokio::time::Instant::now();
    let waiting = lab.clone();
    let waits = tokio::spawn(async move {
        let begun = waiting.arrivals.begin(StreamNumber(8), 1, 0, 1).await;
        begun.err().map(|e| e.to_string())
    });
    for _ in 0..3 {
        tokio::time::sleep(DEAD_PEER * 3 / 4).await;
        lab.arrivals.count(1);
    }
    let error = waits.await.unwrap().unwrap();
    assert!(error.contains("stream 8"), "{error}");
    assert!(began.elapsed() >= DEAD_PEER * 3, "{:?}", began.elapsed());
}

/// What follows an image on the first connection may need it: it waits for its last bytes.
#[tokio::test]
async fn a_set_is_settled_when_what_has_ended_is_stored() {
    let lab = Arc::new(Lab::new(2));
    let set = SetNumber(1);
    lab.arrivals.settled(set, None).await.unwrap(); // it has not ended
    assert!(lab.arrivals.end(STREAM, 3, None).unwrap().is_none());
    let others = ImageName::new("core-1.img").unwrap();
    lab.arrivals.settled(set, Some(&others)).await.unwrap();
    lab.arrivals.settled(SetNumber(2), None).await.unwrap();
    let waits = [None, Some(name())].map(|wanted| {
        let lab = lab.clone();
        tokio::spawn(async move {
            lab.arrivals.settled(set, wanted.as_ref()).await.unwrap();
            lab.stored(&name())
        })
    });
    tokio::task::yield_now().await;
    assert!(waits.iter().all(|waits| !waits.is_finished()));
    assert!(lab.receive(1, 0, b"all").unwrap().is_some());
    for waits in waits {
        assert_eq!(waits.await.unwrap().unwrap(), b"all");
    }
}

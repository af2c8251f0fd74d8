//! A pickle machine that can build data and nothing else.
//!
//! A pickle is a program. Python's machine may import any name and call it; this one knows the opcodes that `torch.save`
//! emits (protocols 2 to 4) and the callables of [`Global`], each of which is a few lines of Rust here. Any other opcode or
//! name ends the reading. Values live in an arena and refer to each other by index: there is no recursion to overflow, not
//! even when they are dropped, and no cycle to leak. Strings stay in the pickle. So memory is at most a constant times the
//! opcodes executed, which are counted.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, bail, ensure};

use super::globals::Global;
use super::view::{Storage, View};

/// Opcodes that a pickle may execute; each allocates at most about 100 bytes. A state dict takes about 60 a tensor.
const MAX_OPCODES: usize = 1_000_000;

/// A value, or the place of one.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A float.
    Float,
    /// Text: bytes of the pickle that are valid UTF-8.
    Text(Range<usize>),
    /// Bytes, or an integer of more than 64 bits: bytes of the pickle.
    Bytes(Range<usize>),
    /// A name on the allow-list.
    Global(Global),
    /// Something in the arena.
    Node(usize),
}

/// What a [`Value::Node`] is.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// A tuple, or what became of `torch.Size`.
    Tuple(Vec<Value>),
    /// A list.
    List(Vec<Value>),
    /// A dictionary, in the order written; of equal keys the last counts.
    Dict(Vec<(Value, Value)>),
    /// Something that holds no tensors and that nobody asks about: a set, a device, a generator's state.
    Opaque,
    /// A storage; its index in [`Machine::storages`].
    Storage(usize),
    /// A tensor over a storage.
    Tensor(Box<View>),
}

/// A machine that has run.
pub struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcodes: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    pub(super) nodes: Vec<Node>,
    pub(super) storages: Vec<Storage>,
    pub(super) by_key: HashMap<String, usize>,
}

impl<'a> Machine<'a> {
    /// A machine at the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Machine<'a> {
        Machine {
            bytes,
            at: 0,
            opcodes: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            nodes: Vec::new(),
            storages: Vec::new(),
            by_key: HashMap::new(),
        }
    }

    /// Runs one pickle, up to its STOP, and returns what it built. Several may follow each other in the old format.
    ///
    /// # Errors
    /// The first opcode that is not allowed, not complete or does not fit what stands before it, with its offset.
    pub fn run(&mut self) -> anyhow::Result<Value> {
        self.stack.clear();
        self.marks.clear();
        self.memo.clear();
        loop {
            let at = self.at;
            if let Some(value) = self.step().with_context(|| format!("pickle, byte {at}"))? {
                return Ok(value);
            }
        }
    }

    /// Bytes of the pickle that have been executed.
    pub fn position(&self) -> usize {
        self.at
    }

    /// All storages that tensors were built over.
    pub fn storages(&self) -> &[Storage] {
        &self.storages
    }

    /// A node of the arena.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// The characters of a [`Value::Text`].
    pub fn text(&self, value: &Value) -> Option<&'a str> {
        match value {
            Value::Text(range) => std::str::from_utf8(&self.bytes[range.clone()]).ok(),
            _ => None,
        }
    }

    /// The bytes of a [`Value::Bytes`].
    pub fn bytes(&self, value: &Value) -> Option<&'a [u8]> {
        match value {
            Value::Bytes(range) => Some(&self.bytes[range.clone()]),
            _ => None,
        }
    }

    /// Counts work that costs time or memory.
    pub(super) fn charge(&mut self, work: usize) -> anyhow::Result<()> {
        self.opcodes = self.opcodes.saturating_add(work);
        ensure!(self.opcodes <= MAX_OPCODES, "more than {MAX_OPCODES} objects; this is no state dict");
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<Option<Value>> {
        self.charge(1)?;
        let opcode = self.take(1)?.start;
        match self.bytes[opcode] {
            // PROTO, FRAME: what they say is not needed.
            0x80 => {
                let version = self.number(1)?;
                ensure!((2..=5).contains(&version), "protocol {version}; 2 to 5 can be read");
            }
            0x95 => {
                self.take(8)?;
            }
            b'.' => {
                let value = self.pop()?;
                ensure!(self.stack.is_empty() && self.marks.is_empty(), "STOP with values left on the stack");
                return Ok(Some(value));
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let top = self.top()?.clone();
                self.stack.push(top);
            }

            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => self.push_int(1)?,
            b'M' => self.push_int(2)?,
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            b'X' => self.push_text(4)?,
            0x8c => self.push_text(1)?,
            0x8d => self.push_text(8)?,
            b'U' => self.push_text(1)?,
            b'T' => self.push_text(4)?,
            b'C' => self.push_bytes(1)?,
            b'B' => self.push_bytes(4)?,
            0x8e => self.push_bytes(8)?,

            b')' => self.push_node(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_mark()?;
                self.push_node(Node::Tuple(items));
            }
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b']' => self.push_node(Node::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.push_node(Node::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            b'}' => self.push_node(Node::Dict(Vec::new())),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            // EMPTY_SET, FROZENSET, ADDITEMS.
            0x8f => self.push_node(Node::Opaque),
            0x91 => {
                self.pop_mark()?;
                self.push_node(Node::Opaque);
            }
            0x90 => {
                self.pop_mark()?;
                let set = self.top()?.clone();
                ensure!(matches!(self.as_node(&set), Some(Node::Opaque)), "ADDITEMS to something that is no set");
            }

            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            0x94 => {
                let value = self.top()?.clone();
                self.memo.insert(self.memo.len() as u64, value);
            }
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,

            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.stack.push(Value::Global(Global::find(module, name)?));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(module), Some(name)) = (self.text(&module), self.text(&name)) else {
                    bail!("STACK_GLOBAL without two strings");
                };
                self.stack.push(Value::Global(Global::find(module, name)?));
            }
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let Value::Global(callable) = self.pop()? else { bail!("a call of something that is no function") };
                let arguments = self.arguments(&arguments)?;
                let value = self.call(callable, &arguments).with_context(|| callable.name())?;
                self.stack.push(value);
            }
            // BUILD: attributes of an object (`_metadata` of a state dict). Nothing in them is weights.
            b'b' => {
                self.pop()?;
                let object = self.top()?.clone();
                ensure!(self.as_node(&object).is_some(), "BUILD on something that is no object");
            }
            b'Q' => {
                let id = self.pop()?;
                let value = self.storage(&id).context("persistent id")?;
                self.stack.push(value);
            }
            other => bail!("opcode {} is not allowed", opcode_name(other)),
        }
        Ok(None)
    }

    fn take(&mut self, length: usize) -> anyhow::Result<Range<usize>> {
        let end = self.at.checked_add(length).filter(|&e| e <= self.bytes.len());
        let end = end.with_context(|| format!("ends early: {length} bytes are missing some"))?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    /// A little-endian number of 1, 2, 4 or 8 bytes.
    fn number(&mut self, width: usize) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        let range = self.take(width)?;
        bytes[..width].copy_from_slice(&self.bytes[range]);
        Ok(u64::from_le_bytes(bytes))
    }

    fn push_int(&mut self, width: usize) -> anyhow::Result<()> {
        let value = self.number(width)? as i64;
        self.stack.push(Value::Int(value));
        Ok(())
    }

    fn counted(&mut self, width: usize) -> anyhow::Result<Range<usize>> {
        let length = self.number(width)?;
        self.take(usize::try_from(length).context("a length past this machine's memory")?)
    }

    fn push_text(&mut self, width: usize) -> anyhow::Result<()> {
        let range = self.counted(width)?;
        // Python 2 strings need not be UTF-8; they are then bytes.
        let valid = std::str::from_utf8(&self.bytes[range.clone()]).is_ok();
        self.stack.push(if valid { Value::Text(range) } else { Value::Bytes(range) });
        Ok(())
    }

    fn push_bytes(&mut self, width: usize) -> anyhow::Result<()> {
        let range = self.counted(width)?;
        self.stack.push(Value::Bytes(range));
        Ok(())
    }

    /// A two's complement integer of any length.
    fn long(&mut self, width: usize) -> anyhow::Result<()> {
        let range = self.counted(width)?;
        let bytes = &self.bytes[range.clone()];
        let value = if bytes.len() <= 8 {
            let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
            let mut full = [if negative { 0xff } else { 0 }; 8];
            full[..bytes.len()].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(full))
        } else {
            Value::Bytes(range)
        };
        self.stack.push(value);
        Ok(())
    }

    fn line(&mut self) -> anyhow::Result<&'a str> {
        const MAX_NAME: usize = 256;
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(MAX_NAME).position(|&b| b == b'\n').context("a name without end")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).context("a name that is not UTF-8")
    }

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> anyhow::Result<Value> {
        ensure!(self.stack.len() > self.floor(), "a value is missing on the stack");
        self.stack.pop().context("a value is missing on the stack")
    }

    fn top(&self) -> anyhow::Result<&Value> {
        ensure!(self.stack.len() > self.floor(), "a value is missing on the stack");
        self.stack.last().context("a value is missing on the stack")
    }

    fn pop_mark(&mut self) -> anyhow::Result<Vec<Value>> {
        let mark = self.marks.pop().context("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_node(&mut self, node: Node) {
        let value = self.new_node(node);
        self.stack.push(value);
    }

    pub(super) fn new_node(&mut self, node: Node) -> Value {
        self.nodes.push(node);
        Value::Node(self.nodes.len() - 1)
    }

    fn tuple(&mut self, length: usize) -> anyhow::Result<()> {
        let start = self.stack.len().checked_sub(length).filter(|&s| s >= self.floor());
        let items = self.stack.split_off(start.context("a value is missing on the stack")?);
        self.push_node(Node::Tuple(items));
        Ok(())
    }

    pub(super) fn as_node(&self, value: &Value) -> Option<&Node> {
        match value {
            Value::Node(index) => self.nodes.get(*index),
            _ => None,
        }
    }

    fn top_node(&mut self) -> anyhow::Result<&mut Node> {
        let Value::Node(index) = *self.top()? else { bail!("items for something that holds none") };
        Ok(&mut self.nodes[index])
    }

    fn append(&mut self, items: Vec<Value>) -> anyhow::Result<()> {
        match self.top_node()? {
            Node::List(list) => list.extend(items),
            Node::Opaque => {}
            _ => bail!("items for something that is no list"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Value>) -> anyhow::Result<()> {
        let Node::Dict(dict) = self.top_node()? else { bail!("keys for something that is no dictionary") };
        ensure!(items.len().is_multiple_of(2), "a key without a value");
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            dict.push((key, value));
        }
        Ok(())
    }

    fn put(&mut self, width: usize) -> anyhow::Result<()> {
        let key = self.number(width)?;
        let value = self.top()?.clone();
        self.memo.insert(key, value);
        Ok(())
    }

    fn get(&mut self, width: usize) -> anyhow::Result<()> {
        let key = self.number(width)?;
        let value = self.memo.get(&key).with_context(|| format!("memo {key} is empty"))?.clone();
        self.stack.push(value);
        Ok(())
    }

    pub(super) fn tuple_items(&self, value: &Value) -> Option<&[Value]> {
        match self.as_node(value)? {
            Node::Tuple(items) => Some(items),
            _ => None,
        }
    }
}

fn opcode_name(opcode: u8) -> String {
    let known = match opcode {
        b'i' => "INST",
        b'o' => "OBJ",
        0x92 => "NEWOBJ_EX",
        b'P' => "PERSID",
        0x82..=0x84 => "EXT",
        0x96..=0x98 => "an out-of-band buffer",
        b'I' | b'L' | b'F' | b'S' | b'V' | b'g' | b'p' | b'd' => "of text protocols 0 and 1",
        _ => "unknown to pickle",
    };
    format!("{opcode:#04x} ({known})")
}

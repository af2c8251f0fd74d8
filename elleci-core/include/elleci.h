// Elleci: running a ternary language model, from C. docs/embedding.md of the project shows how.
//
// Made by cbindgen from elleci-core/src/capi: do not edit.
//
// - Every call returns an ElleciStatus. A last argument `message`, which may be null, takes the reason in words.
// - Where nothing else is said, a pointer may not be null, handles come from this library and have not been freed, and arrays
//   have as many elements as their count says. Null pointers, misaligned arrays and counts that do not fit are refused.
// - Handles may be freed in any order: a session keeps its model alive. What a call uses at the moment is not freed: that
//   answers ELLECI_STATUS_BUSY.
// - Models and threads may be used by any number of threads at once. A session, sampler or batch takes one call at a time, from
//   any thread, and answers ELLECI_STATUS_BUSY to a second one.
// - A null `threads` means that the call works on the calling thread. Results are the same bits with any threads.
// - There is no global state. When memory runs out in the midst of a call, the process aborts.

#ifndef ELLECI_H
#define ELLECI_H

#include <stddef.h>
#include <stdint.h>

// The version of this interface. It is raised whenever a function, structure or code changes its meaning; new functions
// alone do not raise it.
#define ELLECI_ABI_VERSION 1

// Bytes of a saved sampler.
#define ELLECI_SAMPLER_BYTES 44

// Bytes of an ElleciMessage.
#define ELLECI_MESSAGE_BYTES 512

// The most threads that a pool may have.
#define ELLECI_MAX_THREADS 1024

// What became of a call. One that fails has changed nothing but its outputs, which it sets to null or leaves alone; except that
// after ELLECI_STATUS_INTERNAL all is open, and that elleci_generate keeps what it has fed until then.
enum ElleciStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It was done.
  ELLECI_STATUS_OK = 0,
  // A pointer that is needed is null.
  ELLECI_STATUS_NULL_POINTER = 1,
  // An argument or an option has a value without meaning, or an array is misaligned.
  ELLECI_STATUS_INVALID_ARGUMENT = 2,
  // The caller's array is too small.
  ELLECI_STATUS_BUFFER_TOO_SMALL = 3,
  // The file cannot be opened or read.
  ELLECI_STATUS_IO = 4,
  // The bytes are no archive that this library can use, or are damaged.
  ELLECI_STATUS_ARCHIVE = 5,
  // A token is not in the vocabulary.
  ELLECI_STATUS_TOKEN = 6,
  // No tokens were given where there must be one at least.
  ELLECI_STATUS_NO_TOKENS = 7,
  // Handles belong to different models.
  ELLECI_STATUS_OTHER_MODEL = 8,
  // There is not as much memory as a session of this model needs.
  ELLECI_STATUS_MEMORY = 9,
  // The bytes are no saved session, or no saved sampler, or are damaged.
  ELLECI_STATUS_SAVED = 10,
  // No logit is a finite number: there is no token to choose.
  ELLECI_STATUS_NO_CANDIDATE = 11,
  // The session, sampler, batch or threads are in use by another call.
  ELLECI_STATUS_BUSY = 12,
  // The system gives no threads.
  ELLECI_STATUS_THREADS = 13,
  // This library was built without what the call needs: files or threads.
  ELLECI_STATUS_UNSUPPORTED = 14,
  // A fault of this library. What was in the call can only be freed; a session may be rewound.
  ELLECI_STATUS_INTERNAL = 15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ElleciStatus ElleciStatus;
#else
typedef int32_t ElleciStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Why a text ended.
enum ElleciStopReason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // `max_tokens` were generated.
  ELLECI_STOP_REASON_MAX_TOKENS = 0,
  // A stop sequence was met.
  ELLECI_STOP_REASON_STOP_SEQUENCE = 1,
  // The callback asked for it.
  ELLECI_STOP_REASON_CANCELLED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ElleciStopReason ElleciStopReason;
#else
typedef int32_t ElleciStopReason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Working memory for advancing several sessions at once. It holds no state between calls.
typedef struct ElleciBatch ElleciBatch;

// A model: the weights of an archive, where they lie. It never changes, and any number of threads may use it.
typedef struct ElleciModel ElleciModel;

// How tokens are chosen, and how many draws have been made.
typedef struct ElleciSampler ElleciSampler;

// The state of one sequence. It keeps its model alive.
typedef struct ElleciSession ElleciSession;

// A pool of threads. Calls that take one do their work on it and wait; several may share one pool.
typedef struct ElleciThreads ElleciThreads;

// Room for the reason of a failure: UTF-8, ended by a zero byte, cut where it is too long. Written by a call that fails
// and by no other.
typedef struct ElleciMessage {
  // The text.
  char text[ELLECI_MESSAGE_BYTES];
} ElleciMessage;

// Tokens for one session.
typedef struct ElleciFeed {
  // The sequence.
  const struct ElleciSession *session;
  // What comes next in it: a prompt or a single token.
  const uint32_t *tokens;
  // How many they are.
  size_t token_count;
} ElleciFeed;

// A sequence of tokens.
typedef struct ElleciTokens {
  // The tokens.
  const uint32_t *tokens;
  // How many they are.
  size_t count;
} ElleciTokens;

// Sees every token of the text as soon as it is certain that it belongs to it. Anything but 0 ends the text.
typedef int (*ElleciOnToken)(uint32_t token, void *user);

// Sees, and may change, the logits before each choice; with them the sequence so far, prompt included.
typedef void (*ElleciOnLogits)(float *logits, size_t logit_count, const uint32_t *tokens, size_t token_count, void *user);

// What to generate. All zeros but `max_tokens` is a good start.
//
// Callbacks run while the session and the sampler are in use: calls for those answer ELLECI_STATUS_BUSY. With threads handed
// in, they run on one of those threads while the caller waits. They must return: a longjmp or an exception out of them is
// undefined.
typedef struct ElleciGenerateOptions {
  // Tokens at most. 0 feeds the prompt and chooses nothing.
  size_t max_tokens;
  // Sequences that end the text and are no part of it. None may be empty.
  const struct ElleciTokens *stop;
  // How many they are.
  size_t stop_count;
  // Called with every token, unless null.
  ElleciOnToken on_token;
  // Called before every choice, unless null.
  ElleciOnLogits on_logits;
  // Handed to the callbacks.
  void *user;
} ElleciGenerateOptions;

// A text that was generated.
typedef struct ElleciGenerated {
  // Tokens that the callback saw.
  size_t token_count;
  // Why there are no more.
  ElleciStopReason reason;
  // Which stop sequence was met; 0 when none was.
  size_t stop_index;
} ElleciGenerated;

// What a model is.
typedef struct ElleciModelInfo {
  // Tokens that there are: logits have as many elements.
  size_t vocab_size;
  // Tokens of the sequences that it was trained on. Longer ones are not refused.
  size_t context;
  // Width of the residual stream.
  size_t d_model;
  // Number of layers.
  size_t layers;
  // Number of parameters.
  uint64_t parameters;
  // Bytes of the archive.
  uint64_t archive_bytes;
  // A number that differs between models.
  uint64_t fingerprint;
} ElleciModelInfo;

// How the next token is chosen. The filters work in the order of llama.cpp: repetition penalty, top-k, top-p, min-p,
// temperature.
typedef struct ElleciSamplerOptions {
  // Divides the logits. 0 chooses the likeliest token always.
  float temperature;
  // Only the likeliest so many tokens are drawn from. 0 = no limit.
  uint32_t top_k;
  // Only the likeliest tokens that together have at least this probability are drawn from. 1 = all.
  float top_p;
  // Only tokens with at least this share of the likeliest token's probability are drawn from. 0 = all.
  float min_p;
  // Positive logits of recent tokens are divided by this, negative ones multiplied. 1 = no penalty.
  float repetition_penalty;
  // How many of the last tokens count as recent. 0 = none.
  uint32_t repetition_window;
  // Seed of the draws.
  uint64_t seed;
} ElleciSamplerOptions;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the library that is linked: it must equal ELLECI_ABI_VERSION of the header.
uint32_t elleci_abi_version(void);

// Makes an empty batch.
ElleciStatus elleci_batch_new(struct ElleciBatch **batch, struct ElleciMessage *message);

// Frees a batch that no call uses. Null is fine.
ElleciStatus elleci_batch_free(struct ElleciBatch *batch);

// Advances every session by its tokens and writes the logits after the last of each: `vocab_size` floats a feed, in the
// order of the feeds. All sessions are of one model, and none comes twice. What a session computes does not depend on its
// company: the bits are those of elleci_session_extend. `logits` may be null, with a capacity of 0, when they are not wanted.
ElleciStatus elleci_batch_extend(const struct ElleciBatch *batch,
                                 const struct ElleciThreads *threads,
                                 const struct ElleciFeed *feeds,
                                 size_t feed_count,
                                 float *logits,
                                 size_t logits_capacity,
                                 struct ElleciMessage *message);

// Feeds `prompt`, which may not be empty, to the session and continues it. Afterwards the session has taken the prompt and
// everything that was chosen except for the last token, which has not been needed yet: begin the next prompt with what
// elleci_session_tokens lacks. `generated` may be null. After a failure, the tokens that the callback has seen stand.
ElleciStatus elleci_generate(const struct ElleciSession *session,
                             const struct ElleciSampler *sampler,
                             const struct ElleciGenerateOptions *options,
                             const struct ElleciThreads *threads,
                             const uint32_t *prompt,
                             size_t prompt_count,
                             struct ElleciGenerated *generated,
                             struct ElleciMessage *message);

// Opens an archive file by mapping it into memory. The file must not be written to while the model or a session of it
// lives; to replace it, rename another over it. `path` is UTF-8, except on Unix, where it is any bytes.
ElleciStatus elleci_model_open(const char *path,
                               const struct ElleciThreads *threads,
                               struct ElleciModel **model,
                               struct ElleciMessage *message);

// Opens an archive from a copy of `bytes`, which are not needed afterwards.
ElleciStatus elleci_model_open_copy(const uint8_t *bytes,
                                    size_t length,
                                    const struct ElleciThreads *threads,
                                    struct ElleciModel **model,
                                    struct ElleciMessage *message);

// Opens an archive where it lies: `bytes` must start at a multiple of 64, and must stay and not change until the model and
// all sessions of it have been freed. Nothing is copied: right for an archive in a constant of the program.
ElleciStatus elleci_model_open_static(const uint8_t *bytes,
                                      size_t length,
                                      const struct ElleciThreads *threads,
                                      struct ElleciModel **model,
                                      struct ElleciMessage *message);

// Frees the handle. The weights go with the last session of the model. Null is fine.
ElleciStatus elleci_model_free(struct ElleciModel *model);

// Tells what a model is.
ElleciStatus elleci_model_info(const struct ElleciModel *model,
                               struct ElleciModelInfo *info,
                               struct ElleciMessage *message);

// The `tokenizer.json` that travels with the model, as bytes that stay for as long as the model or a session of it; null
// and 0 when there is none.
ElleciStatus elleci_model_tokenizer(const struct ElleciModel *model,
                                    const uint8_t **bytes,
                                    size_t *length,
                                    struct ElleciMessage *message);

// Sets the options that one starts from: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no penalty, seed 0.
ElleciStatus elleci_sampler_defaults(struct ElleciSamplerOptions *options, struct ElleciMessage *message);

// Makes a sampler that has drawn nothing yet.
ElleciStatus elleci_sampler_new(const struct ElleciSamplerOptions *options,
                                struct ElleciSampler **sampler,
                                struct ElleciMessage *message);

// Frees a sampler that no call uses. Null is fine.
ElleciStatus elleci_sampler_free(struct ElleciSampler *sampler);

// Chooses a token. `logits` are used as scratch; `history` is the sequence so far, prompt included, for the repetition
// penalty. A logit that is not finite is never chosen, so that -INFINITY bans a token.
ElleciStatus elleci_sampler_sample(const struct ElleciSampler *sampler,
                                   float *logits,
                                   size_t logit_count,
                                   const uint32_t *history,
                                   size_t history_count,
                                   uint32_t *token,
                                   struct ElleciMessage *message);

// Writes everything that the next choices depend on: ELLECI_SAMPLER_BYTES.
ElleciStatus elleci_sampler_save(const struct ElleciSampler *sampler,
                                 uint8_t *bytes,
                                 size_t capacity,
                                 struct ElleciMessage *message);

// Makes a sampler from what elleci_sampler_save wrote. It makes the choices that the saved one would have made.
ElleciStatus elleci_sampler_restore(const uint8_t *bytes,
                                    size_t length,
                                    struct ElleciSampler **sampler,
                                    struct ElleciMessage *message);

// Begins an empty sequence.
ElleciStatus elleci_session_new(const struct ElleciModel *model,
                                struct ElleciSession **session,
                                struct ElleciMessage *message);

// Frees a session that no call uses. Null is fine.
ElleciStatus elleci_session_free(struct ElleciSession *session);

// Makes a second session that stands where this one does. It is cheap: the two share what neither has changed since.
ElleciStatus elleci_session_fork(const struct ElleciSession *session,
                                 struct ElleciSession **fork,
                                 struct ElleciMessage *message);

// Puts a session where `mark` stands, another session of the same model: mostly an earlier fork, to come back to.
ElleciStatus elleci_session_rewind(const struct ElleciSession *session,
                                   const struct ElleciSession *mark,
                                   struct ElleciMessage *message);

// Tokens that the sequence has so far.
ElleciStatus elleci_session_position(const struct ElleciSession *session,
                                     size_t *position,
                                     struct ElleciMessage *message);

// Copies the tokens that the sequence has so far. `count` is set to their number, also when `capacity` is too small for
// them.
ElleciStatus elleci_session_tokens(const struct ElleciSession *session,
                                   uint32_t *tokens,
                                   size_t capacity,
                                   size_t *count,
                                   struct ElleciMessage *message);

// Takes the next tokens, a prompt or a single one, and writes the logits of the token after them: `vocab_size` floats.
// `logits` may be null, with a capacity of 0, when they are not wanted.
ElleciStatus elleci_session_extend(const struct ElleciSession *session,
                                   const struct ElleciThreads *threads,
                                   const uint32_t *tokens,
                                   size_t token_count,
                                   float *logits,
                                   size_t logits_capacity,
                                   struct ElleciMessage *message);

// Writes the whole state of a session. `length` is set to its bytes, also when `capacity` is too small for them: a first
// call with a capacity of 0 asks for the size.
ElleciStatus elleci_session_save(const struct ElleciSession *session,
                                 uint8_t *bytes,
                                 size_t capacity,
                                 size_t *length,
                                 struct ElleciMessage *message);

// Makes a session from what elleci_session_save wrote, of the same model. It goes on to the bit as the saved one would.
ElleciStatus elleci_session_restore(const struct ElleciModel *model,
                                    const uint8_t *bytes,
                                    size_t length,
                                    struct ElleciSession **session,
                                    struct ElleciMessage *message);

// Starts `count` threads; 0 means as many as the machine runs at once. Results are the same bits with any number of them.
ElleciStatus elleci_threads_new(size_t count,
                                struct ElleciThreads **threads,
                                struct ElleciMessage *message);

// Ends threads that no call works on, and waits for them. Null is fine.
ElleciStatus elleci_threads_free(struct ElleciThreads *threads);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ELLECI_H */

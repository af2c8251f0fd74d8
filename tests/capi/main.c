// Every function and every code of the C ABI, from C: main TINY_T5 TINY_I2.
//
// Not provoked here: ELLECI_STATUS_MEMORY (needs a model as large as the machine), ELLECI_STATUS_INTERNAL (needs a fault of the
// library) and ELLECI_STATUS_THREADS (needs a system that refuses threads): src/capi/tests.rs holds the first two.
// ELLECI_STATUS_UNSUPPORTED belongs to the library without std: tests/no-std/main.c.
#include "elleci.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ElleciMessage message;

static void fail(int line, const char *what) {
    fprintf(stderr, "main.c:%d: %s; the last message is: %s\n", line, what, message.text);
    exit(1);
}

#define CHECK(condition) \
    do { \
        if (!(condition)) fail(__LINE__, #condition); \
    } while (0)
#define OK(call) CHECK((call) == ELLECI_STATUS_OK)

/// A call that must fail with this code and say why, in words that contain `part`.
#define REFUSED(code, part, call) \
    do { \
        memset(&message, 0, sizeof message); \
        CHECK((call) == ELLECI_STATUS_##code); \
        CHECK(strstr(message.text, part) != NULL); \
    } while (0)

enum { VOCAB = 61, TEXT = 12 };

static const uint32_t PROMPT[3] = {1, 2, 3};
// As in elleci-core/tests/committed.rs, where it says why every machine chooses these.
static const uint32_t GREEDY[TEXT] = {21, 35, 11, 0, 20, 58, 20, 33, 56, 58, 58, 28};

static uint8_t *read_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    CHECK(fseek(file, 0, SEEK_END) == 0);
    *length = (size_t)ftell(file);
    rewind(file);
    // A multiple of 64, as aligned_alloc wants it.
    uint8_t *bytes = aligned_alloc(64, (*length + 63) / 64 * 64);
    CHECK(bytes != NULL && fread(bytes, 1, *length, file) == *length);
    fclose(file);
    return bytes;
}

static void extend(ElleciSession *session, const uint32_t *tokens, size_t count, float *logits) {
    OK(elleci_session_extend(session, NULL, tokens, count, logits, VOCAB, &message));
    for (size_t i = 0; i < VOCAB; i++) CHECK(isfinite(logits[i]));
}

static size_t position(const ElleciSession *session) {
    size_t at = SIZE_MAX;
    OK(elleci_session_position(session, &at, &message));
    return at;
}

/// What callbacks see and do.
typedef struct Watch {
    uint32_t tokens[TEXT];
    size_t count, stop_after, choices;
    ElleciSession *session;
    ElleciSampler *sampler;
    ElleciThreads *threads;
} Watch;

static int on_token(uint32_t token, void *user) {
    Watch *watch = user;
    if (watch->count < TEXT) watch->tokens[watch->count] = token;
    return ++watch->count == watch->stop_after;
}

/// Tries to use and to free what is in use.
static int on_token_meddling(uint32_t token, void *user) {
    Watch *watch = user;
    size_t at;
    uint8_t state[ELLECI_SAMPLER_BYTES];
    REFUSED(BUSY, "session is in use", elleci_session_position(watch->session, &at, &message));
    REFUSED(BUSY, "sampler is in use", elleci_sampler_save(watch->sampler, state, sizeof state, &message));
    CHECK(elleci_session_free(watch->session) == ELLECI_STATUS_BUSY);
    CHECK(elleci_sampler_free(watch->sampler) == ELLECI_STATUS_BUSY);
    CHECK(elleci_threads_free(watch->threads) == (watch->threads ? ELLECI_STATUS_BUSY : ELLECI_STATUS_OK));
    return on_token(token, user);
}

static void force_token_7(float *logits, size_t logit_count, const uint32_t *tokens, size_t token_count, void *user) {
    Watch *watch = user;
    CHECK(logit_count == VOCAB && token_count == 3 + watch->choices && tokens[0] == PROMPT[0]);
    watch->choices++;
    for (size_t i = 0; i < logit_count; i++) logits[i] = i == 7 ? 0.0f : -INFINITY;
}

static void ban_all(float *logits, size_t logit_count, const uint32_t *tokens, size_t token_count, void *user) {
    (void)tokens, (void)token_count, (void)user;
    for (size_t i = 0; i < logit_count; i++) logits[i] = NAN;
}

static ElleciSession *new_session(const ElleciModel *model) {
    ElleciSession *session = NULL;
    OK(elleci_session_new(model, &session, &message));
    CHECK(session != NULL);
    return session;
}

static ElleciSampler *new_sampler(float temperature) {
    ElleciSampler *sampler = NULL;
    ElleciSamplerOptions options;
    OK(elleci_sampler_defaults(&options, &message));
    CHECK(options.temperature == 0.8f && options.top_k == 40 && options.seed == 0);
    options.temperature = temperature;
    OK(elleci_sampler_new(&options, &sampler, &message));
    return sampler;
}

static void models(const char *path, uint8_t *bytes, size_t length) {
    ElleciModel *mapped = NULL, *copied = NULL, *borrowed = NULL, *none = (ElleciModel *)&message;
    OK(elleci_model_open(path, NULL, &mapped, &message));
    OK(elleci_model_open_copy(bytes, length, NULL, &copied, &message));
    OK(elleci_model_open_static(bytes, length, NULL, &borrowed, &message));

    ElleciModelInfo info, other;
    OK(elleci_model_info(mapped, &info, &message));
    OK(elleci_model_info(borrowed, &other, &message));
    CHECK(info.vocab_size == VOCAB && info.context == 32 && info.d_model == 40 && info.layers == 3);
    CHECK(info.archive_bytes == length && info.parameters > 20000 && info.fingerprint == other.fingerprint);
    REFUSED(NULL_POINTER, "info", elleci_model_info(mapped, NULL, &message));
    REFUSED(NULL_POINTER, "length", elleci_model_tokenizer(mapped, &(const uint8_t *){NULL}, NULL, &message));
    const uint8_t *tokenizer;
    size_t tokenizer_length;
    OK(elleci_model_tokenizer(copied, &tokenizer, &tokenizer_length, &message));
    CHECK(tokenizer_length == 13 && memcmp(tokenizer, "{\"stub\":true}", 13) == 0);

    // The last session keeps the weights.
    ElleciSession *session = new_session(copied), *same = new_session(borrowed);
    OK(elleci_model_free(copied));
    float logits[VOCAB], again[VOCAB];
    extend(session, PROMPT, 3, logits);
    extend(same, PROMPT, 3, again);
    CHECK(memcmp(logits, again, sizeof logits) == 0);
    OK(elleci_session_free(session));
    OK(elleci_session_free(same));
    OK(elleci_model_free(borrowed));
    OK(elleci_model_free(mapped));
    OK(elleci_model_free(NULL));

    REFUSED(IO, "/nowhere/at.all", elleci_model_open("/nowhere/at.all", NULL, &none, &message));
    CHECK(none == NULL);
    REFUSED(IO, "regular file", elleci_model_open("/", NULL, &none, &message));
    REFUSED(NULL_POINTER, "path", elleci_model_open(NULL, NULL, &none, &message));
    REFUSED(NULL_POINTER, "model", elleci_model_open(path, NULL, NULL, &message));
    CHECK(elleci_model_open(NULL, NULL, NULL, NULL) == ELLECI_STATUS_NULL_POINTER);
    REFUSED(NULL_POINTER, "bytes", elleci_model_open_copy(NULL, length, NULL, &none, &message));
    REFUSED(INVALID_ARGUMENT, "bytes", elleci_model_open_copy(bytes, SIZE_MAX, NULL, &none, &message));
    REFUSED(ARCHIVE, "no .elleci archive", elleci_model_open_copy(bytes, 0, NULL, &none, &message));
    REFUSED(ARCHIVE, "cut off", elleci_model_open_copy(bytes, length - 64, NULL, &none, &message));
    REFUSED(ARCHIVE, "multiple of 64", elleci_model_open_static(bytes + 8, length - 8, NULL, &none, &message));
    bytes[length - 1] ^= 1;
    REFUSED(ARCHIVE, "damaged", elleci_model_open_copy(bytes, length, NULL, &none, &message));
    bytes[length - 1] ^= 1;
    REFUSED(NULL_POINTER, "model", elleci_model_info(NULL, &info, &message));
}

static void sessions(const ElleciModel *model, const ElleciModel *other_model) {
    ElleciSession *session = new_session(model), *other = new_session(other_model), *none = (ElleciSession *)&message;
    float logits[VOCAB], again[VOCAB];
    uint32_t tokens[8];
    size_t count;
    extend(session, PROMPT, 3, logits);
    CHECK(position(session) == 3);

    // Fork: both go on alike, and apart.
    ElleciSession *fork = NULL;
    OK(elleci_session_fork(session, &fork, &message));
    extend(session, GREEDY, 2, logits);
    extend(fork, GREEDY, 2, again);
    CHECK(memcmp(logits, again, sizeof logits) == 0);
    extend(fork, PROMPT, 1, again);
    CHECK(memcmp(logits, again, sizeof logits) != 0);
    CHECK(position(session) == 5 && position(fork) == 6);

    // Save and restore, and rewind: the same bits.
    REFUSED(BUFFER_TOO_SMALL, "bytes", elleci_session_save(session, NULL, 0, &count, &message));
    uint8_t *saved = malloc(count);
    size_t saved_length = count;
    CHECK(saved != NULL && count > 100);
    OK(elleci_session_save(session, saved, saved_length, &count, &message));
    ElleciSession *restored = NULL;
    OK(elleci_session_restore(model, saved, saved_length, &restored, &message));
    OK(elleci_session_rewind(fork, session, &message));
    OK(elleci_session_rewind(fork, fork, &message));
    extend(session, PROMPT, 1, logits);
    extend(restored, PROMPT, 1, again);
    CHECK(memcmp(logits, again, sizeof logits) == 0);
    extend(fork, PROMPT, 1, again);
    CHECK(memcmp(logits, again, sizeof logits) == 0);
    OK(elleci_session_tokens(restored, tokens, 8, &count, &message));
    CHECK(count == 6 && memcmp(tokens, PROMPT, sizeof PROMPT) == 0 && tokens[3] == GREEDY[0] && tokens[5] == 1);

    // Refusals, after which the session is as it was.
    const uint32_t bad = VOCAB;
    REFUSED(TOKEN, "61", elleci_session_extend(session, NULL, &bad, 1, logits, VOCAB, &message));
    REFUSED(NO_TOKENS, "no tokens", elleci_session_extend(session, NULL, NULL, 0, logits, VOCAB, &message));
    REFUSED(NULL_POINTER, "tokens", elleci_session_extend(session, NULL, NULL, 1, logits, VOCAB, &message));
    REFUSED(NULL_POINTER, "logits", elleci_session_extend(session, NULL, PROMPT, 1, NULL, VOCAB, &message));
    REFUSED(BUFFER_TOO_SMALL, "60 elements of 61", elleci_session_extend(session, NULL, PROMPT, 1, logits, 60, &message));
    REFUSED(INVALID_ARGUMENT, "aligned",
            elleci_session_extend(session, NULL, (uint32_t *)(void *)(saved + 1), 1, logits, VOCAB, &message));
    REFUSED(INVALID_ARGUMENT, "elements", elleci_session_extend(session, NULL, PROMPT, SIZE_MAX / 4, logits, VOCAB, &message));
    REFUSED(NULL_POINTER, "session", elleci_session_extend(NULL, NULL, PROMPT, 1, logits, VOCAB, &message));
    REFUSED(NULL_POINTER, "position", elleci_session_position(session, NULL, &message));
    REFUSED(BUFFER_TOO_SMALL, "tokens", elleci_session_tokens(session, tokens, 5, &count, &message));
    CHECK(count == 6 && position(session) == 6);
    REFUSED(NULL_POINTER, "fork", elleci_session_fork(session, NULL, &message));
    REFUSED(NULL_POINTER, "mark", elleci_session_rewind(session, NULL, &message));
    REFUSED(OTHER_MODEL, "another model", elleci_session_rewind(session, other, &message));
    REFUSED(OTHER_MODEL, "another model", elleci_session_restore(other_model, saved, saved_length, &none, &message));
    CHECK(none == NULL);
    REFUSED(SAVED, "cut off", elleci_session_restore(model, saved, saved_length - 1, &none, &message));
    saved[saved_length / 2] ^= 4;
    REFUSED(SAVED, "damaged", elleci_session_restore(model, saved, saved_length, &none, &message));
    OK(elleci_session_extend(session, NULL, PROMPT, 1, NULL, 0, &message));
    CHECK(position(session) == 7);

    free(saved);
    OK(elleci_session_free(restored));
    OK(elleci_session_free(fork));
    OK(elleci_session_free(other));
    OK(elleci_session_free(session));
    OK(elleci_session_free(NULL));
}

static void samplers(void) {
    ElleciSampler *sampler = new_sampler(1.0f), *again = NULL;
    float logits[VOCAB];
    uint32_t first[8], token;
    uint8_t state[ELLECI_SAMPLER_BYTES];
    OK(elleci_sampler_save(sampler, state, sizeof state, &message));
    OK(elleci_sampler_restore(state, sizeof state, &again, &message));
    for (size_t n = 0; n < 8; n++) {
        for (size_t i = 0; i < VOCAB; i++) logits[i] = (float)(i % 5);
        OK(elleci_sampler_sample(sampler, logits, VOCAB, first, n, &first[n], &message));
        for (size_t i = 0; i < VOCAB; i++) logits[i] = (float)(i % 5);
        OK(elleci_sampler_sample(again, logits, VOCAB, first, n, &token, &message));
        CHECK(token == first[n] && token < VOCAB);
    }
    for (size_t i = 0; i < VOCAB; i++) logits[i] = -INFINITY;
    REFUSED(NO_CANDIDATE, "finite", elleci_sampler_sample(sampler, logits, VOCAB, NULL, 0, &token, &message));
    REFUSED(NO_CANDIDATE, "finite", elleci_sampler_sample(sampler, NULL, 0, NULL, 0, &token, &message));
    REFUSED(NULL_POINTER, "history", elleci_sampler_sample(sampler, logits, VOCAB, NULL, 1, &token, &message));
    REFUSED(NULL_POINTER, "token", elleci_sampler_sample(sampler, logits, VOCAB, NULL, 0, NULL, &message));
    REFUSED(BUFFER_TOO_SMALL, "bytes", elleci_sampler_save(sampler, state, sizeof state - 1, &message));
    OK(elleci_sampler_free(again));
    REFUSED(SAVED, "44 bytes", elleci_sampler_restore(state, 43, &again, &message));
    CHECK(again == NULL);
    ElleciSamplerOptions options;
    OK(elleci_sampler_defaults(&options, &message));
    options.top_p = 0.0f;
    REFUSED(INVALID_ARGUMENT, "top_p", elleci_sampler_new(&options, &again, &message));
    REFUSED(NULL_POINTER, "options", elleci_sampler_new(NULL, &again, &message));
    REFUSED(NULL_POINTER, "options", elleci_sampler_defaults(NULL, &message));
    OK(elleci_sampler_free(sampler));
    OK(elleci_sampler_free(NULL));
}

static void generation(const ElleciModel *model, ElleciThreads *threads) {
    ElleciSession *empty = new_session(model), *session = new_session(model);
    ElleciSampler *sampler = new_sampler(0.0f);
    Watch watch = {.session = session, .sampler = sampler, .threads = threads};
    ElleciGenerateOptions options = {.max_tokens = TEXT, .on_token = on_token_meddling, .user = &watch};
    ElleciGenerated text;
    OK(elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    CHECK(text.reason == ELLECI_STOP_REASON_MAX_TOKENS && text.token_count == TEXT && watch.count == TEXT);
    CHECK(memcmp(watch.tokens, GREEDY, sizeof GREEDY) == 0);
    CHECK(position(session) == 3 + TEXT - 1);

    // Cancelled by the callback, and by a stop sequence.
    options.on_token = on_token;
    watch.count = 0, watch.stop_after = 4;
    OK(elleci_session_rewind(session, empty, &message));
    OK(elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    CHECK(text.reason == ELLECI_STOP_REASON_CANCELLED && text.token_count == 4 && watch.count == 4);
    const uint32_t never[2] = {60, 59};
    const ElleciTokens stop[2] = {{never, 2}, {GREEDY + 2, 2}};
    options.stop = stop, options.stop_count = 2;
    watch.count = 0, watch.stop_after = 0;
    OK(elleci_session_rewind(session, empty, &message));
    OK(elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    CHECK(text.reason == ELLECI_STOP_REASON_STOP_SEQUENCE && text.stop_index == 1 && text.token_count == watch.count);
    CHECK(text.token_count <= 2);

    // The hook chooses.
    options.stop_count = 0, options.on_logits = force_token_7;
    watch.count = 0;
    OK(elleci_session_rewind(session, empty, &message));
    OK(elleci_generate(session, sampler, &options, threads, PROMPT, 3, NULL, &message));
    CHECK(watch.choices == TEXT && watch.tokens[0] == 7 && watch.tokens[TEXT - 1] == 7);
    options.on_logits = ban_all;
    REFUSED(NO_CANDIDATE, "finite", elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    options.on_logits = NULL;

    const ElleciTokens no_stop[1] = {{NULL, 0}}, null_stop[1] = {{NULL, 2}};
    options.stop = no_stop, options.stop_count = 1;
    REFUSED(INVALID_ARGUMENT, "stop", elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    options.stop = null_stop;
    REFUSED(NULL_POINTER, "stop", elleci_generate(session, sampler, &options, threads, PROMPT, 3, &text, &message));
    options.stop_count = 0;
    REFUSED(NO_TOKENS, "no tokens", elleci_generate(session, sampler, &options, threads, PROMPT, 0, &text, &message));
    REFUSED(NULL_POINTER, "sampler", elleci_generate(session, NULL, &options, threads, PROMPT, 3, &text, &message));
    REFUSED(NULL_POINTER, "options", elleci_generate(session, sampler, NULL, threads, PROMPT, 3, &text, &message));
    OK(elleci_session_free(empty));
    OK(elleci_session_free(session));
    OK(elleci_sampler_free(sampler));
}

/// Threads and company change no bit.
static void batches(const ElleciModel *model, const ElleciModel *other_model, const ElleciThreads *threads) {
    ElleciSession *a = new_session(model), *b = new_session(model), *alone = new_session(model);
    ElleciSession *other = new_session(other_model);
    ElleciBatch *batch = NULL;
    OK(elleci_batch_new(&batch, &message));
    float together[2 * VOCAB], logits[VOCAB];
    ElleciFeed feeds[2] = {{a, PROMPT, 3}, {b, GREEDY, 5}};
    OK(elleci_batch_extend(batch, threads, feeds, 2, together, 2 * VOCAB, &message));
    extend(alone, GREEDY, 5, logits);
    CHECK(memcmp(together + VOCAB, logits, sizeof logits) == 0);
    CHECK(position(a) == 3 && position(b) == 5);

    REFUSED(NO_TOKENS, "no tokens", elleci_batch_extend(batch, threads, feeds, 0, together, 2 * VOCAB, &message));
    REFUSED(BUFFER_TOO_SMALL, "logits", elleci_batch_extend(batch, threads, feeds, 2, together, VOCAB, &message));
    feeds[0].session = b;
    REFUSED(BUSY, "in use", elleci_batch_extend(batch, threads, feeds, 2, together, 2 * VOCAB, &message));
    feeds[0].session = NULL;
    REFUSED(NULL_POINTER, "session", elleci_batch_extend(batch, threads, feeds, 2, together, 2 * VOCAB, &message));
    feeds[0].session = other;
    REFUSED(OTHER_MODEL, "another", elleci_batch_extend(batch, threads, feeds, 2, together, 2 * VOCAB, &message));
    REFUSED(NULL_POINTER, "batch", elleci_batch_extend(NULL, threads, feeds, 2, together, 2 * VOCAB, &message));
    REFUSED(NULL_POINTER, "batch", elleci_batch_new(NULL, &message));
    CHECK(position(b) == 5);
    OK(elleci_batch_free(batch));
    OK(elleci_batch_free(NULL));
    OK(elleci_session_free(a));
    OK(elleci_session_free(b));
    OK(elleci_session_free(alone));
    OK(elleci_session_free(other));
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    CHECK(elleci_abi_version() == ELLECI_ABI_VERSION);
    size_t length;
    uint8_t *bytes = read_file(argv[1], &length);
    models(argv[1], bytes, length);
    free(bytes);

    ElleciThreads *threads = NULL;
    REFUSED(INVALID_ARGUMENT, "1024", elleci_threads_new(ELLECI_MAX_THREADS + 1, &threads, &message));
    REFUSED(NULL_POINTER, "threads", elleci_threads_new(3, NULL, &message));
    OK(elleci_threads_new(3, &threads, &message));
    ElleciModel *model = NULL, *other = NULL;
    OK(elleci_model_open(argv[1], threads, &model, &message));
    OK(elleci_model_open(argv[2], NULL, &other, &message));
    sessions(model, other);
    samplers();
    generation(model, NULL);
    generation(model, threads);
    batches(model, other, NULL);
    batches(model, other, threads);
    OK(elleci_model_free(model));
    OK(elleci_model_free(other));
    OK(elleci_threads_free(threads));
    OK(elleci_threads_free(NULL));
    puts("the C ABI holds");
    return 0;
}

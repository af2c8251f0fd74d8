/* Calls elleci-core built without Rust's standard library, and holds it against what the build with it printed:
 *
 *     probe CODES BEFORE AFTER DECODED        (the output of `cargo run -p elleci-core --example probe`)
 *
 * The integer codes must be equal. The floats are sums that the two builds take in different orders; over four
 * steps of AdamW their float32 rounding (1e-7), and now and then an int8 code on the other side of a tie, move a loss
 * near 4 in its fourth or fifth digit. 2e-3 leaves room for that; a wrong step moves it by some hundredths.
 */
#include "elleci.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct probe {
    uint64_t codes;
    double before, after, decoded;
};

void elleci_probe(struct probe *out);

static int differs(const char *name, double found, const char *expected, double tolerance) {
    double want = strtod(expected, NULL);
    int wrong = !(fabs(found - want) <= tolerance);
    printf("%s %.6f, with std %.6f%s\n", name, found, want, wrong ? "  DIFFERS" : "");
    return wrong;
}

/* The C ABI is there in this library, too, less files and threads. */
static int abi_is_wrong(void) {
    ElleciMessage message = {{0}};
    ElleciModel *model = NULL;
    ElleciThreads *threads = NULL;
    int wrong = elleci_abi_version() != ELLECI_ABI_VERSION;
    wrong |= elleci_model_open("model.elleci", NULL, &model, &message) != ELLECI_STATUS_UNSUPPORTED;
    printf("C ABI %u: %s\n", elleci_abi_version(), message.text);
    wrong |= elleci_threads_new(2, &threads, &message) != ELLECI_STATUS_UNSUPPORTED;
    wrong |= elleci_model_open_copy((const uint8_t *)"no archive", 10, NULL, &model, &message) != ELLECI_STATUS_ARCHIVE;
    return wrong;
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: probe CODES BEFORE AFTER DECODED\n");
        return 2;
    }
    struct probe p;
    elleci_probe(&p);
    int wrong = p.codes != strtoull(argv[1], NULL, 16);
    printf("ternary codes %016llx, with std %s%s\n", (unsigned long long)p.codes, argv[1], wrong ? "  DIFFER" : "");
    wrong |= differs("loss", p.before, argv[2], 1e-4);
    wrong |= differs("loss after training", p.after, argv[3], 2e-3);
    wrong |= differs("largest decoded logit", p.decoded, argv[4], 2e-2);
    wrong |= !(p.after < p.before);
    wrong |= abi_is_wrong();
    return wrong;
}
